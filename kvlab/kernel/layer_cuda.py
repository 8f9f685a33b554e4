"""What a decoder computes between two attentions, in one launch: CUDA C++ compiled at run time.

A product of one row reads some megabytes, and a launch's ramp and drain take as long as they do.
Here one block per multiprocessor stays for four products, with barriers over the grid between
them, while a warp of its own streams the weights on (`chain.cu`). Where `takes` says no, the
kernels of `layer_triton` compute the same.

One launch at a time: blocks wait for each other, so two streams must not run this at once.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.kernel import nvrtc
from kvlab.kernel.layer_ref import Finish, Heads, Start

FEWEST_ROWS, MOST_ROWS = 2, 16  # one row: `layer_triton` is as fast
SLOTS = {8: 8, 16: 8}  # of the ring, 8 weight rows x PIECE columns each
OUT_HALVES = {8: 1, 16: 2}  # 8 or 16 outputs of a block where there are few
THREADS = 288


class Sizes(NamedTuple):
    """Compiled into the kernel, by the names of its macros."""

    TYPE_F16: int
    HIDDEN: int
    MIXED: int
    INNER: int
    DIM: int
    HEADS: int
    KV: int
    NORMED: int
    BIASED: int


class Kernel(NamedTuple):
    """A loaded kernel, its launch, and the memory that its launches share."""

    function: object
    grid: int
    shared: int
    mid: Tensor
    inner: Tensor
    sync: Tensor
    squares: Tensor


POINTERS = (
    "mixed", "x", "o", "mid_gain", "gate", "up", "down", "gain", "q", "k", "v", "q_bias", "k_bias",
    "v_bias", "q_gain", "k_gain", "cos", "sin", "mid", "inner", "out", "q_out", "k_out", "v_out",
    "sync", "squares",
)


class Args(ctypes.Structure):
    """As in `chain.cu`."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("rows", "finishes", "starts", "cos_stride")),
        *((name, ctypes.c_double) for name in ("mid_eps", "eps", "head_eps")),
    ]


def sizes(x: Tensor, finish: Finish, start: Start) -> Sizes:
    heads, kv = start.heads, start.kv_heads
    dim = start.weights[0].shape[0] // heads
    return Sizes(x.dtype == torch.float16, x.shape[1], heads * dim, finish.down.shape[1], dim,
                 heads, kv, start.q_gain is not None, start.biases is not None)


def takes(x: Tensor, finish: Finish, start: Start) -> bool:
    """Whether the kernel runs here and takes these rows and shapes."""
    if x.dtype.itemsize != 2 or not nvrtc.usable(x.device):
        return False
    if not FEWEST_ROWS <= len(x) <= MOST_ROWS:
        return False
    return _usable(x.device, sizes(x, finish, start))


@lru_cache(maxsize=64)
def _usable(device: torch.device, of: Sizes) -> bool:
    per_head = of.DIM // 16
    return (_piece(of) > 0 and of.DIM % 16 == 0 and per_head & (per_head - 1) == 0
            and of.HIDDEN % 16 == 0 and of.INNER % 8 == 0)


def _piece(of: Sizes) -> int:
    """Columns of a slot of the ring; 0 where the inner widths have no common one."""
    widths = (of.HIDDEN, of.MIXED, of.INNER)
    return next((n for n in (1024, 512) if all(w % n == 0 for w in widths)), 0)


def tiles(count: int, processors: int, choices: tuple[int, ...]) -> int:
    """Tiles that a block multiplies at once, of `count`: the fewest rounds, then the least work."""
    fitting = [n for n in choices if count % n == 0]
    return min(fitting, key=lambda n: (-(-count // n // processors) * n, -n))


def _macros(of: Sizes, rows: int, processors: int) -> dict[str, int]:
    padded = next(n for n in (8, 16) if rows <= n)
    per_head = of.DIM // 16
    few = tuple(n for n in (1, 2, 4) if per_head % n == 0 and per_head <= 8 * n * n)
    return {name: int(value) for name, value in of._asdict().items()} | {
        "ROWS": padded, "PIECE": _piece(of), "SLOTS": SLOTS[padded],
        "OUT_HALVES": OUT_HALVES[padded],
        "GATE_TILES": tiles(of.INNER // 8, processors, (1, 2, 3, 4)),
        "QKV_TILES": tiles((of.HEADS + 2 * of.KV) * per_head, processors, few),
    }


def shared_bytes(m: dict[str, int]) -> int:
    """Shared memory of a block: the ring, then struct `Shared`."""
    split = 8 // (4 if m["ROWS"] > 32 else 2 if m["ROWS"] > 16 else 1)
    part = split * max(m["GATE_TILES"], m["QKV_TILES"]) * 16 * m["ROWS"]
    slot = 8 * (2 * m["PIECE"] + 64)
    return m["SLOTS"] * slot + 4 * (part + split * m["ROWS"]) + 16 * m["SLOTS"] + 8


@cache  # captured graphs go on using it
def _kernel(device: torch.device, of: Sizes, padded: int) -> Kernel:
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    m = _macros(of, padded, processors)
    shared = shared_bytes(m)
    function = nvrtc.function("chain.cu", "chain", m, shared)
    heads = (of.HEADS + 2 * of.KV) * of.DIM // 16 // m["QKV_TILES"]
    units = (of.HIDDEN // 8 // m["OUT_HALVES"], of.INNER // 8 // m["GATE_TILES"], heads)
    dtype = torch.float16 if of.TYPE_F16 else torch.bfloat16
    with torch.inference_mode(False):
        return Kernel(
            function, min(processors, max(units)), shared,
            torch.empty(padded, of.HIDDEN, dtype=dtype, device=device),
            torch.empty(padded, of.INNER, dtype=dtype, device=device),
            torch.zeros(64, dtype=torch.int64, device=device),
            torch.zeros(heads * padded, dtype=torch.int64, device=device),
        )


def chain(
    x: Tensor, mixed: Tensor | None, finish: Finish | None, start: Start | None,
    cos: Tensor | None, sin: Tensor | None, of: Sizes,
) -> tuple[Tensor, Heads | None]:
    """As `layer_ref.chain`; of: the model's `sizes`."""
    rows, device = len(x), x.device
    kernel = _kernel(device, of, next(n for n in (8, 16) if rows <= n))
    a = Args(rows=rows, finishes=finish is not None, starts=start is not None)
    given = {"x": x, "mid": kernel.mid, "inner": kernel.inner, "sync": kernel.sync,
             "squares": kernel.squares}
    out, heads = x, None
    if finish is not None:
        out = torch.empty_like(x)
        a.mid_eps = finish.eps
        given |= {"mixed": mixed, "out": out, "o": finish.o, "mid_gain": finish.gain,
                  "gate": finish.gate, "up": finish.up, "down": finish.down}
    if start is not None:
        heads = tuple(x.new_empty(rows, n, of.DIM) for n in (of.HEADS, of.KV, of.KV))
        a.eps, a.head_eps = start.eps, start.head_eps
        a.cos_stride = cos.stride(0) if len(cos) > 1 else 0
        given |= {"gain": start.gain, "cos": cos, "sin": sin}
        given |= dict(zip(("q", "k", "v"), start.weights))
        given |= dict(zip(("q_out", "k_out", "v_out"), heads))
        given |= dict(zip(("q_bias", "k_bias", "v_bias"), start.biases or ()))
        if start.q_gain is not None:
            given |= {"q_gain": start.q_gain, "k_gain": start.k_gain}
    for name, tensor in given.items():
        setattr(a, name, tensor.data_ptr())
    nvrtc.launch(kernel.function, a, grid=kernel.grid, threads=THREADS, shared=kernel.shared,
                 device=device)
    return out, heads
