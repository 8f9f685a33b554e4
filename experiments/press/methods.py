"""Which of kvlab's methods stands beside which of kvpress's, and at what granularity."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kvlab.budget import AdaKV
from kvlab.cache import CacheSpec
from kvlab.window import NoWindow, SinkWindow


class Method(NamedTuple):
    """A method of ours, and what stands beside it.

    arm: kvpress's (`arms.py`). sinks, recent: first and newest tokens that kvpress never gives up.
    policy, floor: ours, and what AdaKV leaves each head, as a share of its part; None: equal parts.
    """

    arm: str
    policy: str
    sinks: int = 0
    recent: int = 0
    floor: float | None = None


METHODS = {
    "snapkv": Method("snapkv", "snapkv", 0, 64),
    "expected_attention": Method("expected_attention", "expected_attention", 4, 0),
    "tova": Method("tova", "tova", 0, 1),
    "key_diff": Method("keydiff", "key_diff"),
    "attention_mass": Method("observed_attention", "attention_mass"),
    "kvzip adakv": Method("kvzip_layerwise", "kvzip", 4, 0, floor=0.0),
    "snapkv adakv": Method("adakv", "snapkv", 0, 64, floor=0.2),
    "window": Method("streaming_llm", "window", 4, 0),
    "lagkv": Method("lagkv", "lagkv", 4, 128),
    "compactor": Method("compactor", "compactor", 8, 4),
    "random": Method("random", "random"),
}


class Grain(NamedTuple):
    """Who chooses what; block: tokens chosen together, None where each is chosen for itself.
    theirs: with kvpress's window, else 4 and 64 tokens."""

    evict: str
    groups: str
    block: int | None = None
    theirs: bool = False


GRAINS = {
    "head": Grain("token", "per_head", theirs=True),  # as kvpress
    "head, 4+64": Grain("token", "per_head"),
    "layer": Grain("token", "per_layer"),
    "all": Grain("token", "all"),
    "layer, blocks of 4": Grain("block", "per_layer", 4),
    "layer, blocks of 16": Grain("block", "per_layer", 16),
    "all, blocks of 16": Grain("block", "all", 16),
}


def spec_of(
    name: str, grain: str, kept: float, tokens: int, block: int = 1, **more
) -> CacheSpec | None:
    """The cache of one of ours that keeps this share of a context of so many tokens; None where
    the granularity means nothing for it.

    block: of tokens chosen one by one, which lie in blocks of so many; 1 is exact to the token, and
    slow on a GPU. more: other fields of the spec.
    """
    method, how = METHODS[name], GRAINS[grain]
    if name == "window":  # one choice for all by nature
        recent = max(1, round(tokens * kept) - max(method.sinks, block))  # whole blocks stay
        window = SinkWindow(method.sinks, recent, middle=False)
        return CacheSpec(block_size=block, window=window, **more) if grain == "head" else None
    if method.floor is not None and how.groups != "per_head":
        return None
    if how.evict == "block" and name in ("lagkv", "compactor", "random", "kvzip adakv"):
        return None
    window = SinkWindow(4, 64)
    if how.theirs:
        window = SinkWindow(method.sinks, max(1, method.recent)) if any(method[2:4]) else NoWindow()
    return CacheSpec(
        policy=method.policy, budget_percent=100 * kept, block_size=how.block or block,
        evict=how.evict, groups=how.groups, window=window,
        budget="equal" if method.floor is None else AdaKV(method.floor), **more,
    )


def pressed(env: Path, model: str, items: Sequence[dict], arms: Sequence[str], dtype: str
            ) -> Iterator[dict]:
    """Lines of `arms.py` on these items, as they come, from the environment of `env.sh`."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "items.jsonl")
        given.write_text("".join(json.dumps(item) + "\n" for item in items))
        script = Path(__file__).with_name("arms.py")
        command = [env / "bin" / "python", script, model, given, "/dev/stdout", "--dtype", dtype,
                   "--arms", *arms]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            for line in running.stdout:
                if line.startswith("{"):  # whatever else a library prints
                    yield json.loads(line)
        if running.returncode:
            raise RuntimeError(f"arms.py ended with {running.returncode}")
