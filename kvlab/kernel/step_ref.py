"""All layers of a decoder for one token in every row, attention included, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kvlab.kernel import blocks_ref, layer_ref
from kvlab.kernel.layer_ref import Finish, Start


class Past(NamedTuple):
    """What attention reads, see `blocks_ref.paged_decode`: planes by layer, tables of all layers.

    open_now counts the step's own token, which the open blocks take.
    """

    sealed: Sequence
    open: Sequence
    format: object
    table: Tensor
    n_blocks: Tensor
    open_slot: Tensor
    open_now: Tensor
    scale: float


def decode_layers(
    x: Tensor, layers: Sequence[tuple[Start, Finish]], cos: Tensor, sin: Tensor, past: Past
) -> Tensor:
    """x [B, K], the embedded tokens -> what the last layer gives; cos, sin: [B, D]."""
    _, heads = layer_ref.chain(x, None, None, layers[0][0], cos, sin)
    for i, (_, finish) in enumerate(layers):
        q, k, v = heads
        mixed, _ = blocks_ref.paged_decode(
            q, past.sealed[i], past.format, past.table, past.n_blocks, past.open[i],
            past.open_slot, past.open_now, scale=past.scale, new=(k, v),
        )
        start = layers[i + 1][0] if i + 1 < len(layers) else None
        x, heads = layer_ref.chain(x, mixed.flatten(1), finish, start, cos, sin)
    return x
