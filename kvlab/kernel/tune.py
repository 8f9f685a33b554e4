"""Launch settings of the kernels: a table that travels with the code, and one measured here.

`choose` never measures: it may run while a graph is captured. `tune.store` (called by
experiments/kernel_roofline) writes what was measured to a small JSON in the user's cache folder;
a device or shape that is in neither table gets settings computed from its size.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path

import torch

# (device name, kind of key and value) -> tile tokens, warps, stages, programs per multiprocessor
DEFAULTS: dict[str, dict[str, list[int]]] = {
    "NVIDIA H200": {},
}
PLAIN = {"dense": [64, 4, 3, 3], "fp8": [128, 4, 3, 3], "int": [128, 4, 3, 3]}


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
    _stored.cache_clear()


@lru_cache(maxsize=1024)
def choose(device: str, key: str, kind: str) -> tuple[int, int, int, int]:
    """(tile tokens, warps, stages, programs per multiprocessor) for a kernel on a device."""
    for table in (_stored(), DEFAULTS):
        if key in table.get(device, {}):
            return tuple(table[device][key])
    return tuple(PLAIN[kind])


@lru_cache(maxsize=16)
def device_facts(device: torch.device) -> tuple[str, int]:
    """Name and number of multiprocessors; on the CPU a small number, to keep tests small."""
    if device.type != "cuda":
        return "cpu", 2
    facts = torch.cuda.get_device_properties(device)
    return facts.name, facts.multi_processor_count
