"""All layers of a decoder for one token of one row, attention included, in one launch (`step.cu`).

At one row a step is a chain of some 200 small products, each waiting for the one before. As
kernels they end and begin anew each time; here 128 blocks stay, and words travel between them.
Where `takes` says no, the kernels of `layer_triton` and `decode_triton` compute the same. Sealed
blocks hold numbers of the row's dtype, or codes of 8, 4 or 2 bits with scales by block.

One launch at a time on a device: blocks wait for each other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from math import e, log2
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.format import Dense, Fp8, Int
from kvlab.kernel import nvrtc
from kvlab.kernel.layer_cuda import tiles
from kvlab.kernel.layer_ref import Finish, Start
from kvlab.kernel.step_ref import Past

GRID, THREADS = 128, 288
CLUSTER, AHEAD = 2, 2  # see step.cu; all chips of the kind have pairs of multiprocessors
SHARED_BYTES = 227 << 10  # of a block, on Hopper
MOST_TOKENS = 8192  # of a row's table: beyond, the kernels that only attend read faster
WORDS = ("qkv", "parts", "lse", "mixed", "mid", "inner", "next")


class Sizes(NamedTuple):
    """Compiled into the kernel, by the names of its macros."""

    TYPE_F16: int
    LAYERS: int
    HIDDEN: int
    MIXED: int
    INNER: int
    DIM: int
    HEADS: int
    KV: int
    NORMED: int
    BIASED: int
    BLOCK: int
    SLAB: int
    OPEN_SLAB: int
    TILED: int
    KBITS: int
    VBITS: int
    KFP8: int
    VFP8: int
    KCHANNEL: int
    KZERO: int
    VZERO: int


LAYER = ("o", "mid_gain", "gate", "up", "down", "gain", "q", "k", "v", "q_bias", "k_bias",
         "v_bias", "q_gain", "k_gain")
POINTERS = ("x", "cos", "sin", "out", "epoch", *WORDS, "base", "open_base", "table", "n_blocks",
            "open_slot", "open_now")
PLANES = {"k": "k_data", "v": "v_data", "ks": "k_scale", "kz": "k_zero", "vs": "v_scale",
          "vz": "v_zero"}  # short names as in `step.cu`
NUMBERS = (*(f"{n}_at" for n in PLANES), *(f"{n}_step" for n in PLANES), "open_k", "open_v",
           "open_step")


class Layer(ctypes.Structure):
    """As in `step.cu`."""

    _fields_ = [(name, ctypes.c_uint64) for name in LAYER]


@lru_cache(maxsize=8)
def _arguments(layers: int) -> type[ctypes.Structure]:
    class Args(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_uint64) for name in (*POINTERS, *NUMBERS)),
            *((name, ctypes.c_double) for name in ("scale", "mid_eps", "eps", "head_eps")),
            ("layers", Layer * layers),
        ]

    return Args


def sizes(x: Tensor, layers: Sequence[tuple[Start, Finish]], past: Past) -> Sizes:
    start, finish = layers[0]
    dim = len(start.weights[0]) // start.heads
    return Sizes(
        int(x.dtype == torch.float16), len(layers), x.shape[1], start.heads * dim,
        len(finish.gate), dim, start.heads, start.kv_heads, int(start.q_gain is not None),
        int(start.biases is not None), past.open[0].planes["k_data"].shape[1],
        past.sealed[0].slab_blocks, past.open[0].slab_blocks, *_codes(past),
    )


def _codes(past: Past) -> tuple[int, ...]:
    """How sealed tokens are stored: `Sizes` from TILED on."""
    key, value, names = past.format.key, past.format.value, past.sealed[0].planes
    if isinstance(key, Dense):
        return (0, 8, 8, 0, 0, 0, 0, 0)
    slots = past.open[0].planes["k_data"].shape[1]
    fp8 = (int(isinstance(side, Fp8)) for side in (key, value))
    return (1, key.bits, value.bits, *fp8, int(key.axis_of(slots) == "channel"),
            *(int(name in names) for name in ("k_zero", "v_zero")))


def takes(x: Tensor, layers: Sequence[tuple[Start, Finish]], past: Past) -> bool:
    """Whether the kernel runs here and takes this row, these layers and this past."""
    if len(x) != 1 or x.dtype.itemsize != 2 or not nvrtc.usable(x.device):
        return False
    slots = past.open[0].planes["k_data"].shape[1]
    if past.table.ndim != 2 or past.table.shape[1] * slots > MOST_TOKENS:
        return False
    if not _stored(past, x.dtype):
        return False
    eps = {(s.eps, s.head_eps, f.eps) for s, f in layers}
    shapes = {(len(s.weights[0]), len(s.weights[1]), f.gate.shape) for s, f in layers}
    regular = len(eps) == len(shapes) == 1 and past.sealed[0].planes["k_data"].offset_bytes >= 0
    return regular and _fits(x.device, sizes(x, layers, past))


def _stored(past: Past, dtype: torch.dtype) -> bool:
    """Whether tokens lie as the kernel reads them: rows of numbers, or tiles of codes."""
    key, value = past.format.key, past.format.value
    slots, _ = past.open[0].planes["k_data"].shape[1:]
    open = past.open[0].planes.values()
    if len({(p.shape, p.dtype) for p in open}) > 1 or next(iter(open)).dtype != dtype:
        return False
    if isinstance(key, Dense) or isinstance(value, Dense):
        return isinstance(key, Dense) and isinstance(value, Dense) and all(
            p.dtype == dtype for p in past.sealed[0].planes.values())
    if {type(key), type(value)} - {Fp8, Int} or getattr(key, "centred", False):
        return False
    zeros = "k_zero" not in past.sealed[0].planes or key.axis_of(slots) == "channel"
    return (slots % 64 == 0 and {key.bits, value.bits} <= {8, 4, 2} and zeros
            and not key.slots_last and value.slots_last and value.axis_of(slots) == "token")


@lru_cache(maxsize=64)
def _fits(device: torch.device, of: Sizes) -> bool:
    if torch.cuda.get_device_properties(device).multi_processor_count < GRID:
        return False
    whole = of.LAYERS % 2 == 0 and of.HIDDEN in (1024, 2048) and of.DIM in (64, 128)
    whole = whole and of.KV in (4, 8, 16) and of.HEADS % of.KV == 0 and of.HEADS // of.KV <= 4
    return (whole and of.MIXED % 512 == 0 and of.INNER % 512 == 0
            and of.MIXED // GRID % (256 // (GRID // of.KV)) == 0
            and _kernel(device, of).resident)


def _macros(of: Sizes) -> dict[str, int]:
    wide = all(w % 1024 == 0 for w in (of.HIDDEN, of.MIXED, of.INNER))
    heads = (of.HEADS + 2 * of.KV) * of.DIM // 16
    few = tuple(n for n in (1, 2) if of.DIM // 16 % n == 0)
    macros = of._asdict() | {
        "PIECE": 1024 if wide else 512, "GRID": GRID, "CLUSTER": CLUSTER,
        "AHEAD": AHEAD * (1 if wide else 2), "OUT_HALVES": of.HIDDEN // 1024,
        "GATE_TILES": tiles(of.INNER // 8, GRID, (1, 2, 3, 4)),
        "QKV_TILES": tiles(heads, GRID, few),
    }
    slot = 16 * macros["PIECE"] + 8 * 64 + 16  # with its barriers
    macros["SLOTS"] = (SHARED_BYTES - shared_bytes(macros | {"SLOTS": 0})) // slot
    return macros | {"SHARED": shared_bytes(macros)}


def shared_bytes(m: dict[str, int]) -> int:
    """Shared memory of a block: the ring, then struct `Shared`."""
    tiles = max(m["GATE_TILES"], m["QKV_TILES"])
    group = m["HEADS"] // m["KV"]
    part = (8 + m["TILED"]) * max(16 * tiles, group * (m["DIM"] + 2))
    part += group * (2 * (64 * m["TILED"] + 4) + 4) + 4
    x = m["HIDDEN"] + max(m["HIDDEN"], m["MIXED"], m["INNER"]) + (group + 2) * m["DIM"]
    floats = part + m["HIDDEN"] // 128
    return m["SLOTS"] * (8 * (2 * m["PIECE"] + 64) + 16) + 2 * x + 4 * floats + 32


class Kernel(NamedTuple):
    """A loaded kernel, the words that its blocks send each other and the layers it has computed."""

    function: object
    shared: int
    resident: bool  # whether all its blocks run at a time here
    words: dict[str, Tensor]


@cache  # captured graphs go on using it
def _kernel(device: torch.device, of: Sizes) -> Kernel:
    m = _macros(of)
    shared = shared_bytes(m)
    function = nvrtc.function("step.cu", "step", m, shared)
    found = nvrtc.resident_clusters(function, CLUSTER, THREADS, shared)
    shares = of.HEADS * GRID // of.KV
    counts = ((of.HEADS + 2 * of.KV) * of.DIM // 2, shares * of.DIM, shares,
              *(n // 2 for n in (of.MIXED, of.HIDDEN, of.INNER, of.HIDDEN)))
    with torch.inference_mode(False):
        words = {name: torch.zeros(2, n, dtype=torch.int64, device=device)
                 for name, n in zip(WORDS, counts)}
        words["epoch"] = torch.zeros(1, dtype=torch.int32, device=device)
    return Kernel(function, shared, found * CLUSTER >= GRID, words)


def decode_layers(
    x: Tensor, layers: Sequence[tuple[Start, Finish]], cos: Tensor, sin: Tensor, past: Past
) -> Tensor:
    """As `step_ref.decode_layers`, of one row that it `takes`."""
    of = sizes(x, layers, past)
    kernel, out = _kernel(x.device, of), torch.empty_like(x)
    (start, finish), sealed, open = layers[0], past.sealed, past.open
    a = _arguments(of.LAYERS)(
        scale=past.scale * log2(e), mid_eps=finish.eps, eps=start.eps, head_eps=start.head_eps
    )
    given = {"x": x, "cos": cos, "sin": sin, "out": out, **kernel.words, "base": sealed[0].base,
             "open_base": open[0].base, "table": past.table, "n_blocks": past.n_blocks,
             "open_slot": past.open_slot, "open_now": past.open_now}
    for name, tensor in given.items():
        setattr(a, name, tensor.data_ptr())
    for name, plane in PLANES.items():
        first, second = (p.planes.get(plane) for p in sealed[:2])
        if first:
            setattr(a, f"{name}_at", first.offset_bytes)
            setattr(a, f"{name}_step", second.offset_bytes - first.offset_bytes)
    first, second = (p.planes for p in open[:2])
    a.open_k, a.open_v = (first[name].offset_bytes for name in ("k_data", "v_data"))
    a.open_step = second["k_data"].offset_bytes - a.open_k
    for i, (start, finish) in enumerate(layers):
        tensors = (finish.o, finish.gain, finish.gate, finish.up, finish.down, start.gain,
                   *start.weights, *(start.biases or (None,) * 3), start.q_gain, start.k_gain)
        for name, tensor in zip(LAYER, tensors):
            setattr(a.layers[i], name, 0 if tensor is None else tensor.data_ptr())
    nvrtc.launch(kernel.function, a, grid=GRID, threads=THREADS, shared=kernel.shared,
                 device=x.device, cluster=CLUSTER)
    return out
