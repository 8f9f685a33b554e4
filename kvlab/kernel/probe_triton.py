"""What the kernels can do on a device, found by compiling and running the smallest of each kind.

`native`: the device has instructions for it, seen in the compiled code; `emulated`: it runs without
them; `interpreted`: Triton's interpreter runs it on the CPU; `no: ...`: it does not run, and why.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kvlab.kernel import interpret
from kvlab.kernel.codes_triton import DENSE, INT
from kvlab.kernel.decode_parts_triton import multiply

# What shows in the machine's assembly that a product or conversion is the device's own.
MARKS = {"fp16": (".f16",), "bf16": (".bf16",), "fp8": ("e4m3x2",), "int8": (".s8.s8", ".s8")}
KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn,
         "int8": torch.int8}
STORED = {"int4": "int8", "int3": "int8", "int2": "int8"}  # multiplied as bytes


@triton.jit
def product_kernel(x, out, WIDEN: tl.constexpr, KIND: tl.constexpr):
    """x @ x of one [32, 32] tile; WIDEN: through fp16, as the decode kernel takes FP8."""
    i = tl.arange(0, 32)
    at = i[:, None] * 32 + i[None, :]
    a = tl.load(x + at)
    if WIDEN:
        a = a.to(tl.float16)
    tl.store(out + at, multiply(a, a, None, KIND))


@lru_cache(maxsize=16)
def support(device: torch.device) -> dict[str, str]:
    """Format -> native, emulated, interpreted or `no: reason`, on `device`."""
    found = {name: _try(name, device) for name in KINDS}
    return found | {name: found[kind] for name, kind in STORED.items()}


def _try(name: str, device: torch.device) -> str:
    if device.type != "cuda" and not interpret.ACTIVE:
        return "no: Triton compiles for GPUs only; TRITON_INTERPRET=1 interprets"
    try:
        return _run(name, device)
    except Exception as error:  # whatever the compiler, the driver or the interpreter refuses with
        return f"no: {(str(error).strip() or type(error).__name__).splitlines()[-1][:120]}"


def _run(name: str, device: torch.device) -> str:
    x = torch.eye(32, device=device).to(KINDS[name])
    whole = name == "int8"
    out = torch.empty(32, 32, dtype=torch.int32 if whole else torch.float32, device=device)
    kernel = product_kernel[(1,)](
        x, out, WIDEN=name == "fp8", KIND=INT if whole else DENSE
    )
    if not torch.equal(out.float(), torch.eye(32, device=device)):
        return "no: wrong product"
    if interpret.ACTIVE:
        return "interpreted"
    return "native" if _native(name, kernel.asm["ptx"]) else "emulated"


def _native(name: str, code: str) -> bool:
    lines = [s for s in code.splitlines() if "mma" in s or (name == "fp8" and "cvt" in s)]
    return any(mark in line for line in lines for mark in MARKS[name])
