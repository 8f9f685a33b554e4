"""Launch settings of the kernels: defaults that travel with the code, and a table measured here.

`choose` never measures: it may run while a graph is captured. `eval.tuning.measure` (or
`python -m kvlab job=tune`) measures once per device and shape and has `store` write a small JSON in
the user's cache folder; whatever is not in it gets the defaults below.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

# Without a measured setting: (kind, tokens that share a tile) -> tile tokens, warps, stages,
# programs per multiprocessor, and a limit of registers where the compiler's own choice lets fewer
# programs in. Measured on an H200 (reports/kernel_roofline). All programs must fit at once: a few
# that wait for a second round cost a quarter. One or two warps leave hardly a barrier.
Setting = tuple[int, ...]
DEFAULTS: dict[str, dict[int, Setting]] = {
    "dense": {256: (64, 4, 2, 4, 128)},
    "fp8": {32: (32, 1, 2, 12), 64: (64, 2, 2, 8), 256: (128, 2, 2, 6, 168)},
    "int8": {32: (32, 1, 2, 12), 64: (64, 2, 2, 8), 256: (128, 2, 2, 6, 168)},
    "int4": {32: (32, 1, 2, 12, 168), 64: (64, 1, 2, 12, 168), 256: (128, 1, 2, 8)},
    "grouped": {256: (32, 1, 2, 12, 168)},
    "fold": {256: (64, 1, 3, 8)},
    "low": {32: (32, 1, 2, 12, 168), 64: (64, 2, 2, 8), 256: (128, 2, 2, 6, 168)},
}


def path() -> Path:
    """The user's table; KVLAB_CACHE moves it."""
    root = os.environ.get("KVLAB_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvlab"
    return Path(root) / "kernels.json"


@lru_cache(maxsize=1)
def _stored() -> dict:
    try:
        return json.loads(path().read_text())
    except (OSError, ValueError):
        return {}


def store(device: str, key: str, setting: list[int]) -> None:
    """Remember `setting` for `key` on `device`; replaces the file in one step."""
    table = dict(_stored())
    table[device] = table.get(device, {}) | {key: setting}
    path().parent.mkdir(parents=True, exist_ok=True)
    new = path().with_suffix(".new")
    new.write_text(json.dumps(table, indent=1, sort_keys=True))
    new.replace(path())
    forget()


@lru_cache(maxsize=1024)
def choose(device: str, key: str, kind: str, span: int) -> tuple[int, ...]:
    """Settings for a kernel on a device.

    key: names format and shape in the stored table; kind: dense, fp8, int8, int4 or low (fewer
    bits on both sides); span: tokens that may share a tile, the block size where scales belong to
    one block.
    """
    stored = _stored().get(device, {}).get(key)
    if stored:
        return tuple(stored)
    return next(s for limit, s in DEFAULTS[kind].items() if span <= limit)


def forget() -> None:
    """Read the stored table again at the next call."""
    _stored.cache_clear()
    choose.cache_clear()


class Device(NamedTuple):
    """What launch decisions depend on."""

    name: str
    processors: int
    chained: bool  # a kernel may start while the one before it ends (Hopper and later)


@lru_cache(maxsize=16)
def device_facts(device: torch.device) -> Device:
    """Facts of a device; of the CPU a small number of processors, to keep tests small."""
    if device.type != "cuda":
        return Device("cpu", 2, False)
    facts = torch.cuda.get_device_properties(device)
    return Device(facts.name, facts.multi_processor_count, facts.major >= 9)
