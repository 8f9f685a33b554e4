"""The first tokens of sequences as they were computed, beside the blocks that hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from kvlab.core import LayerShape
from kvlab.format import Plane
from kvlab.kernel.blocks_ref import First
from kvlab.pool.slabs import Meter, SlabStore


class Apart:
    """Keys and values of up to `tokens` first tokens of each block that begins a sequence.

    Attention sinks are unlike all other tokens: a scale that has to span them leaves few steps for
    the rest, and an error in them reaches every query (StreamingLLM,
    https://arxiv.org/abs/2309.17453; KVQuant, https://arxiv.org/abs/2401.18079). So they stay in
    the compute dtype, and their places in the sealed block hold the codes of the first token
    behind them (`behind`): no codec has to know of them.

    A row belongs to ids: block ids, and host keys as `away` writes them, since the bytes stay on
    the device when a block leaves for the host. It is written when its block is sealed, and never
    again, so all that hold a copy of the block share it. Planes of a layer of a row:

    k_data, v_data  [H, tokens, D] in the compute dtype
    count           int32 [H], how many of a head's first tokens are here: `tokens` of them, or
                    fewer where a head gave some of them up
    """

    def __init__(
        self, tokens: int, shape: LayerShape, layers: int, dtype: torch.dtype, device, meter: Meter
    ):
        self.tokens, self.device = tokens, torch.device(device)
        heads = shape.kv_heads
        planes = {
            "k_data": Plane((heads, tokens, shape.k_width), dtype),
            "v_data": Plane((heads, tokens, shape.v_width), dtype),
            "count": Plane((heads,), torch.int32),
        }
        self.store = SlabStore(planes, layers, 1, device, meter)
        self.heads, self.rows = heads, {}  # id -> row
        self._users: Counter[int] = Counter()
        self._free: list[int] = []
        self._ragged: set[int] = set()  # rows whose heads may hold unlike many
        self._all: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether any sequence's first tokens are here."""
        return bool(self.rows)

    @property
    def all(self) -> Tensor:
        """int32 [H]: all that can be."""
        if self._all is None:
            with torch.inference_mode(False):
                self._all = torch.full((self.heads,), self.tokens, dtype=torch.int32,
                                       device=self.device)  # fmt: skip
        return self._all

    # ---- rows

    def take(self, ids: Iterable[int]) -> None:
        """A row for each of `ids`, if any tokens are kept at all."""
        for id in ids if self.tokens else ():
            if id not in self.rows:
                row = self._free.pop() if self._free else len(self._users)  # none is free: all used
                self.store.commit([row])
                self.rows[id], self._users[row] = row, 1

    def share(self, pairs: Iterable[tuple[int, int]]) -> None:
        """For each (id, other): `other` holds the same contents as `id` from now on."""
        for id, other in pairs if self.rows else ():
            if id in self.rows:
                self.rows[other] = self.rows[id]
                self._users[self.rows[id]] += 1

    def drop(self, ids: Iterable[int]) -> None:
        """Forget these ids; a row that nobody holds any more is given back."""
        for id in ids if self.rows else ():
            row = self.rows.pop(id, None)
            if row is not None:
                self._users[row] -= 1
                if not self._users[row]:
                    del self._users[row]
                    self._ragged.discard(row)
                    self.store.drop([row])
                    self._free.append(row)

    def holds(self, ids: list[int]) -> list[int]:
        """Places in `ids` of those that have a row."""
        if not self.rows or self.rows.keys().isdisjoint(ids):
            return []
        return [place for place, id in enumerate(ids) if id in self.rows]

    # ---- contents

    def write(
        self, layer: int, id: int, k: Tensor, v: Tensor, count: Tensor | None = None
    ) -> None:
        """Keep the first of the tokens k, v [n, H, D] of a block: `count` int32 [H], or all."""
        self._put(self.row(layer, id), k, v, count)
        if count is not None:
            self._ragged.add(self.rows[id])

    def _put(self, row: dict[str, Tensor], k: Tensor, v: Tensor, count: Tensor | None) -> None:
        for name, x in (("k_data", k), ("v_data", v)):
            row[name].copy_(x[..., : self.tokens, :, :].transpose(-3, -2))
        row["count"].copy_(self.all if count is None else count)

    def row(self, layer: int, id: int) -> dict[str, Tensor]:
        """Plane name -> what is kept in a layer, a view."""
        return self.store.row(layer, self.rows[id])

    def patch(self, layer: int, ids: list[int], k: Tensor, v: Tensor) -> None:
        """Put the tokens that are here into what blocks `ids` read, k and v [n*S, H, D]."""
        size = len(k) // max(1, len(ids))
        for place in self.holds(ids):
            number = self.rows[ids[place]]
            row, here = self.store.row(layer, number), slice(place * size, place * size + size)
            for name, x in (("k_data", k), ("v_data", v)):
                first, kept = x[here][: self.tokens], row[name].transpose(0, 1)
                first.copy_(self._over(first, kept, row) if number in self._ragged else kept)

    def _over(self, first: Tensor, kept: Tensor, row: dict[str, Tensor]) -> Tensor:
        known = torch.arange(self.tokens, device=self.device)[:, None] < row["count"]
        return torch.where(known[..., None], kept, first)

    def first(self, layer: int, row: Tensor, block: Tensor) -> First | None:
        """What the decode kernel reads, see `First`; None where no tokens are ever kept."""
        return First(self.store.layer(layer), row, block) if self.tokens else None

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    def check(self, live: set[int]) -> None:
        """Raise AssertionError unless every row has its users, and all ids are `live`."""
        assert Counter(self.rows.values()) == self._users, "rows kept apart and their users"
        gone = self.rows.keys() - live
        assert not gone, f"first tokens are kept of {sorted(gone)}, which are gone"


def away(key: int) -> int:
    """The id of a block in host memory, by its key there."""
    return -1 - key


def behind(x: Tensor, count: Tensor) -> Tensor:
    """Of a block's tokens x [S, H, D] those that set scales: the first `count` [H] of each head
    are replaced by the one behind them."""
    place = torch.arange(len(x), device=x.device)[:, None]
    place = place.maximum(count.to(place.dtype)).clamp_max(len(x) - 1)
    return x.gather(0, place[..., None].expand_as(x))
