"""What a decoded token passes on its way: calls, files, and hand-offs between attention and kernel.

`sys.setprofile` hears every call of a Python function. Counted are those written in kvlab, without
what a kernel's own functions call (they are the destination). The model has random
weights and kernels compute nothing: only the way to them is of interest.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

LAYERS = (2, 4)  # two depths: what grows with the layers is told from what does not
PROMPT, BLOCK, TOKENS = 21, 16, 3  # tokens; no measured token fills a block
MODEL = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "eos_token_id": None, "bos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip


ATTENDS = re.compile("attend|decode")
INLINED = ("<listcomp>", "<setcomp>", "<dictcomp>")  # calls until Python 3.11 only


class Passed(NamedTuple):
    """calls: (file, function), one entry a call. handoffs: functions on the stack from the
    registered attention to a kernel that attends, the kernel not counted."""

    calls: list[tuple[str, str]]
    handoffs: list[int]


class Listener:
    """Hears calls of functions in `root`; `kernel` is the folder where the way ends, `entry` the
    attention that kvlab registered with the library."""

    def __init__(self, root: Path):
        from transformers import AttentionInterface

        self.entry = AttentionInterface()["kvlab_paged"].__code__
        self.root, self.kernel = f"{root / 'kvlab'}/", f"{root / 'kvlab' / 'kernel'}/"
        self.calls: list[tuple[str, str]] = []
        self.handoffs: list[int] = []
        self._generators: set = set()

    def hear(self, frame, event: str, _argument) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(self.root) or self._below_kernel(frame):
            return
        if frame.f_code.co_name in INLINED:
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            if frame in self._generators:  # goes on, was called before
                return
            self._generators.add(frame)
        self.calls.append((name.removeprefix(self.root), frame.f_code.co_qualname))
        if name.startswith(self.kernel) and ATTENDS.search(frame.f_code.co_name):
            depth = self._depth(frame.f_back)
            self.handoffs += [] if depth is None else [depth]

    def _below_kernel(self, frame) -> bool:
        caller = frame.f_back
        while caller is not None:
            if caller.f_code.co_filename.startswith(self.kernel):
                return True
            caller = caller.f_back
        return False

    def _depth(self, frame) -> int | None:
        """Frames of kvlab up to the registered attention; None where that is not on the way."""
        count = 0
        while frame is not None:
            count += frame.f_code.co_filename.startswith(self.root)
            if frame.f_code is self.entry:
                return count
            frame = frame.f_back
        return None


def listened(root: Path, run: Callable[[], object]) -> Passed:
    """One run under the profile."""
    listener = Listener(root)
    sys.setprofile(listener.hear)
    try:
        run()
    finally:
        sys.setprofile(None)
    return Passed(listener.calls, listener.handoffs)


def decoded(root: Path, driver: str, layers: int) -> list[Passed]:
    """`TOKENS` tokens of one sequence after a prompt, by `driver` of `Decoder`; or "model": the
    library's own forward, called as `generate()` calls it; or "replay": the static step without
    what a CUDA graph repeats."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from triton.runtime.interpreter import InterpretedFunction

    from kvlab import PagedCache, prefill
    from kvlab.model.decode import Decoder

    InterpretedFunction.__getitem__ = lambda *_: lambda *_, **__: None  # a launch costs minutes
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**MODEL, num_hidden_layers=layers)).eval()
    cache = PagedCache.for_model(model, format="int8", block_size=BLOCK, kernels="triton")
    with torch.inference_mode():
        prefill(model, torch.randint(1, 32, (1, PROMPT)), cache, chunk_tokens=PROMPT)
        token = torch.ones(1, 1, dtype=torch.long)
        if driver == "model":
            step = partial(model, token, past_key_values=cache, use_cache=True)
        else:
            decoder = Decoder(model, cache, driver="static" if driver == "replay" else driver)
            step = partial(decoder.step, token)
        passed = [listened(root, step)]
        if driver == "replay":
            decoder._step.run = lambda: None  # where the graph would be launched
        passed += [listened(root, step) for _ in range(TOKENS)]
    return passed[1:]  # the first sets things up


def measured(root: Path, driver: str) -> dict[str, float]:
    """Medians over tokens, at the smaller depth and by layer."""
    few, many = ([_counts(one) for one in decoded(root, driver, n)] for n in LAYERS)
    middle = [{key: median(one[key] for one in rows) for key in rows[0]} for rows in (few, many)]
    per_layer = (middle[1]["calls"] - middle[0]["calls"]) / (LAYERS[1] - LAYERS[0])
    return {**middle[0], "calls_per_layer": per_layer}


def _counts(passed: Passed) -> dict[str, float]:
    outside = [call for call in passed.calls if not call[0].startswith("kvlab/kernel/")]
    return {
        "calls": len(outside),
        "files": len({file for file, _ in outside}),
        "functions": len(set(outside)),
        "handoffs": max(passed.handoffs, default=0),
    }
