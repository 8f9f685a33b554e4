"""What a chunk of prefill costs the host: launches, Triton's among them, and Python calls.

    python experiments/token_eviction/count.py [--model smollm2|qwen] [--chunk 512] [--past 4]

Counted on the CPU, on the way that CUDA goes: a kernel, interpreted, counts as one launch, and so
does the library's attention. Operators that only make
views launch nothing. Weights are random, layers few: the cost of a layer is the difference between
4 and 2 of them, the rest is that of the chunk.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from kvlab.cache import CacheSpec
from kvlab.kernel import all_triton, attend_sdpa, best_ref, shares_ref
from kvlab.model import PagedCache
from kvlab.model.fuse import fused
from kvlab.model.prefill import forward_chunk
from kvlab.window import SinkWindow

QUICK = best_ref, shares_ref  # in the place of interpreted kernels
POLICIES = (None, "snapkv", "expected_attention", "tova", "attention_mass", "key_norm")


class Count(TorchDispatchMode):
    """launches: of torch; triton: of kernels."""

    def __init__(self):
        super().__init__()
        self.launches = self.triton = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.launches += not is_view(function)
        return out

    def one(self, kernel, triton: bool):
        """`kernel` as one launch, whatever it does."""
        def run(*args, **kwargs):
            self.triton += triton
            self.launches += not triton
            profile = sys.getprofile()
            sys.setprofile(None)
            try:
                with _disable_current_modes():
                    return kernel(*args, **kwargs)
            finally:
                sys.setprofile(profile)
        return run


def is_view(function) -> bool:
    schema = function._schema
    aliased = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    name = schema.name.removeprefix("aten::")
    return aliased or name in ("empty", "empty_strided", "detach", "_reshape_alias", "lift_fresh")


@contextmanager
def counted(count: Count):
    """Kernels as on CUDA, each one launch."""
    old = {name: getattr(all_triton, name) for name in all_triton.__all__}
    library, last = attend_sdpa._on_cpu, getattr(attend_sdpa, "attend_last", None)

    def once(q, k, v, **how):
        """As the library's kernel on CUDA does it for a short chunk."""
        return [attend_sdpa.merge(last(q, k, v, **how))]

    for name, kernel in old.items():
        quick = next((getattr(r, name) for r in QUICK if hasattr(r, name)), kernel)
        setattr(all_triton, name, count.one(quick, triton=True))
    attend_sdpa._on_cpu = count.one(library, triton=False)
    attend_sdpa.attend_last = count.one(once, triton=False)
    try:
        yield
    finally:
        for name, kernel in old.items():
            setattr(all_triton, name, kernel)
        attend_sdpa._on_cpu, attend_sdpa.attend_last = library, last


def model(kind: str, layers: int):
    torch.manual_seed(0)
    common = {"num_hidden_layers": layers, "vocab_size": 512, "rms_norm_eps": 1e-5}
    if kind == "smollm2":
        made = LlamaForCausalLM(LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
            **common))
    else:
        made = Qwen2ForCausalLM(Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2,
            **common))
    return made.eval().requires_grad_(False)


def axes(policy: str | None, percent: float = 10) -> dict:
    """Of a cache of blocks of 16 under a policy that chooses tokens by head, or none."""
    if policy is None:
        return {"block_size": 16}
    return {"block_size": 16, "policy": policy, "budget_percent": percent, "evict": "token",
            "groups": "per_head", "window": SinkWindow(4, 64)}  # fmt: skip


def chunk(kind: str, layers: int, policy: str | None, size: int, past: int) -> tuple[int, int, int]:
    """Launches of torch, of Triton, and Python calls of one chunk behind `past` others."""
    of = model(kind, layers)
    ids = torch.randint(512, (1, size))
    count, calls = Count(), 0

    def called(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    with fused(of), counted(count):
        spec = CacheSpec(format="fp32", kernels="triton", **axes(policy))
        cache = PagedCache.for_model(of, spec)
        for _ in range(past):
            forward_chunk(of, ids, cache, last=True)
        count.launches = count.triton = 0
        with torch.inference_mode(), count:
            forward_chunk(of, ids, cache, last=True)
        launches = count.launches, count.triton
        sys.setprofile(called)
        forward_chunk(of, ids, cache, last=True)
        sys.setprofile(None)
    return *launches, calls


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--model", default="smollm2", choices=("smollm2", "qwen"))
    asked.add_argument("--chunk", type=int, default=512)
    asked.add_argument("--past", type=int, default=4, help="chunks before the one that is counted")
    given = asked.parse_args()
    print("| policy | launches a layer | Triton's | Python calls a layer | launches of the chunk "
          "beside | Python calls beside |\n|---|---:|---:|---:|---:|---:|")
    for policy in POLICIES:
        few, more = (chunk(given.model, n, policy, given.chunk, given.past) for n in (2, 4))
        each = [(b - a) / 2 for a, b in zip(few, more)]
        rest = [a - 2 * x for a, x in zip(few, each)]
        print(f"| {policy or 'none'} | {each[0] + each[1]:.1f} | {each[1]:.1f} | {each[2]:.0f} | "
              f"{rest[0] + rest[1]:.0f} | {rest[2]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
