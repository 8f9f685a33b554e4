"""Copy rows of planes between two stores, byte by byte, in one launch for each plane.

Addresses come from the stores' own tables, so either side may be pinned host memory: the bus
carries each byte once, and any set of rows costs the same number of launches.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernel.codes_triton import typed

WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
RUN = 2048  # words of one program


@triton.jit
def move_kernel(
    source, target, source_ids, target_ids, source_at, target_at, source_step, target_step,
    nbytes, SP: tl.constexpr, TP: tl.constexpr, WORD: tl.constexpr, BYTES: tl.constexpr,
    RUN: tl.constexpr,
):
    """Program (row of the list, layer, piece of the row). `at`: byte offset of the plane in a slab
    for the first layer; `step`: from one layer to the next; SP, TP: rows in a slab."""
    i, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    a, b = tl.load(source_ids + i), tl.load(target_ids + i)
    word = tl.program_id(2) * RUN + tl.arange(0, RUN)
    known = word < nbytes // BYTES
    at = tl.load(source + a // SP) + source_at + layer * source_step + (a % SP) * nbytes
    x = tl.load(typed(at, WORD) + word, mask=known, other=0)
    at = tl.load(target + b // TP) + target_at + layer * target_step + (b % TP) * nbytes
    tl.store(typed(at, WORD) + word, x, mask=known)


def move(sources, targets, source_ids: Tensor, target_ids: Tensor) -> None:
    """Rows `source_ids` of the stores' layers `sources` -> rows `target_ids` of `targets`.

    sources, targets: lists of `LayerPlanes`, layer by layer, evenly spaced in their slabs; ids:
    int64 [n] on the device.
    """
    a, b = sources[0], targets[0]
    for name, plane in a.planes.items():
        nbytes, other = plane.block_stride_bytes, b.planes[name]
        steps = [layers[-1].planes[name].offset_bytes - layers[0].planes[name].offset_bytes
                 for layers in (sources, targets)]
        steps = [step // max(1, len(sources) - 1) for step in steps]
        size = next(n for n in WORDS if not any(
            x % n for x in (nbytes, plane.offset_bytes, other.offset_bytes, *steps)))
        grid = len(source_ids), len(sources), triton.cdiv(nbytes // size, RUN)
        move_kernel[grid](
            a.base, b.base, source_ids, target_ids, plane.offset_bytes, other.offset_bytes,
            *steps, nbytes, SP=a.slab_blocks, TP=b.slab_blocks, WORD=WORDS[size], BYTES=size,
            RUN=RUN, num_warps=4,
        )
