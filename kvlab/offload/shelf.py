"""Blocks that left the device, in host memory: nothing is lost, and attention still reads them.

The past of a long prompt is streamed through the device in every chunk of prefill (FlexGen,
https://arxiv.org/abs/2303.06865, streams weights and cache so; ours streams pieces of one layer,
in the stored format, and merges exact partial results). Blocks are copied as stored: spilling and
fetching change no bit.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from heapq import heappop, heappush, nsmallest

import torch
from torch import Tensor

from kvlab.blocks import BlockLedger, NoStorage, NoTier, mode_by_name
from kvlab.core import BadInput, check_number
from kvlab.offload.base import NoOffload
from kvlab.offload.memory import HostMemory
from kvlab.offload.slabs import HostSlabs, rows_of
from kvlab.offload.stage import Seat, Stage, ids_on
from kvlab.policy import asked, by_name
from kvlab.pool import BlockPool, Coming, LayerPlanes, away, lane_for


class HostStore(NoOffload):
    """Evicted blocks go to host memory, in their format, and stay part of the past.

    cap_gb: GB (10**9 bytes) of host memory for all caches built with this object; null: 90 % of
        what the machine has free. At the limit, `OutOfHost` before anything has changed.
    slab_tokens: tokens that are pinned at a time; one layer of them is one copy to the device.
    policy: which known prefix leaves host memory first when it is full, one of axis policy.
    mode: which of them are copied, and when: exclusive, write_back or write_through, see
        `blocks/tiers.py`; the last two need prefix=hash with hold=true.
    layerwise: whether a known prefix comes back layer by layer on a stream of its own, so that the
        first layers compute while the others come; else all of it comes before.
    """

    name = "host"
    keeps = True

    def __init__(
        self, cap_gb: float | None = None, slab_tokens: int = 4096, policy: str = "lru",
        mode: str = "exclusive", layerwise: bool = False,
    ):
        check_number("offload.cap_gb", cap_gb, 0, 1e9, whole=False, above=True, null=True)
        check_number("offload.slab_tokens", slab_tokens)
        self.cap_gb, self.slab_tokens = cap_gb, slab_tokens
        self.policy, self.mode, self._kind = policy, mode, mode_by_name(mode)
        self.layerwise = layerwise
        chosen = asked(policy)
        if not chosen.evicts or chosen.scored or chosen.foresees or chosen.asks:
            raise BadInput("offload.policy", policy, "must go by what it is told of blocks alone, "
                           "as lru or fifo do")
        self.memory = HostMemory(None if cap_gb is None else int(cap_gb * 1e9))

    def build(self, pool: BlockPool) -> Shelf:
        """The host half of one pool; pools of one cache and shape share their way to the device."""
        move = None if pool.fused is None else pool.fused.move
        name = f"stage {pool.shape.stored}"
        stage = pool.workspace.shared(name, partial(Stage, pool.device, move))
        rows = max(1, self.slab_tokens // pool.geometry.block_size)
        coming = Coming(self.lane(pool.device)) if self.layerwise else None
        return Shelf(pool, rows, self.memory, stage, coming)

    lane = staticmethod(lane_for)  # where copies of `layerwise` run

    def tier(self, storage: NoStorage) -> NoTier:
        return self._kind(BlockLedger(None, by_name(self.policy)), storage)


class Shelf:
    """Host rows of one layer group. A key names a block; it lives until its last holder drops it.

    `spill` and `fetch` run on the stream that computes, so a device block is never reused before
    its copy is done; `prefetch` runs on a stream of its own, and so does `fetch` with `coming`, for
    which the pool's sealed store waits layer by layer.
    """

    keeps = True

    def __init__(
        self, pool: BlockPool, slab_rows: int, memory: HostMemory, stage: Stage,
        coming: Coming | None = None,
    ):
        self.pool, self.memory, self.stage, sealed = pool, memory, stage, pool.sealed
        self.store = HostSlabs(sealed.planes, sealed.layers, slab_rows, pool.device, memory)
        self.coming = coming
        if coming is not None:
            sealed.expect(coming)
        self._holders: dict[int, int] = {}
        self._free: list[int] = []  # heap of keys below len(_holders) + len(_free)
        self._return_slabs_when_gone()

    def _return_slabs_when_gone(self) -> None:
        slabs, memory = self.store.slabs, self.memory
        weakref.finalize(self, _give_back, slabs, memory, self.pool.device).atexit = False

    def __setstate__(self, state: dict) -> None:
        """A copy has slabs of its own to return."""
        vars(self).update(state)
        self._return_slabs_when_gone()

    # ---- blocks come and go

    def require(self, count: int) -> None:
        """Take the memory that `count` more blocks need. Raises `OutOfHost`; nothing changes."""
        self.require_beside(count, {})

    def require_beside(self, count: int, others: dict[int, int]) -> None:
        """The same beside what others were promised: slabs by their bytes, counted on here."""
        nbytes = self.store.slab_bytes
        slabs = others.get(nbytes, 0) + self.store.missing(self._next(count))
        self.memory.reserve(slabs, nbytes, self.pool.device)
        others[nbytes] = slabs

    def reserve(self, tokens: int) -> None:
        """Have pinned memory ready for `tokens` more tokens, so that no step waits for it."""
        self.require(-(-tokens // self.pool.geometry.block_size))

    def spill(self, blocks: list[int]) -> list[int]:
        """Copy sealed `blocks`, all layers, device -> host; returns a key for each.

        Raises `OutOfHost` before anything has changed.
        """
        self.require(len(blocks))
        keys = self._next(len(blocks))
        self.store.commit(keys)
        for key in keys:
            if self._free and self._free[0] == key:
                heappop(self._free)
            self._holders[key] = 1
        self._move(self.pool.sealed, self.store, blocks, keys)
        self.pool.apart.share(zip(blocks, map(away, keys)))
        self.stage.forget(wrote=True)
        return keys

    def fetch(self, keys: list[int], blocks: list[int]) -> None:
        """Copy `keys` back into sealed `blocks`, every bit as it was; the keys stay."""
        self.pool.sealed.commit(blocks)
        if self.coming is None:
            self._move(self.store, self.pool.sealed, keys, blocks)
        else:
            self.memory.read_until(self.coming.start(self._by_layer(keys, blocks)))
        self.pool.apart.share(zip(map(away, keys), blocks))

    def share(self, keys: list[int]) -> None:
        """One more holder for each of `keys`."""
        for key in keys:
            self._holders[key] += 1

    def drop(self, keys: list[int]) -> None:
        """One holder less for each; what nobody holds is gone."""
        gone = []
        for key in keys:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                heappush(self._free, key)
                gone.append(key)
        if gone:
            self.stage.forget(wrote=False)
            self.store.drop(gone)
            self.pool.apart.drop(map(away, gone))

    # ---- reading

    def prefetch(self, layer: int, keys: list[int]) -> None:
        """Start to bring one layer of `keys` to the device, while something else is computed."""
        if keys:
            self.stage.start(self.store, layer, tuple(keys))

    def read(self, layer: int, keys: list[int]) -> tuple[Tensor, Tensor]:
        """One layer of `keys`, dequantized: two [n*S, H, D] in the compute dtype.

        With kernels they lie in the pool's workspace, until its next read.
        """
        seat, rows = self.stage.take(self.store, layer, tuple(keys))
        pair = self._dequantize(seat, rows)
        self.stage.done(seat)
        self.pool.apart.patch(layer, [away(key) for key in keys], *pair)
        return pair

    def planes(self, layer: int) -> LayerPlanes:
        """Where one layer lies in host memory, for kernels that read it in place."""
        return self.store.layer(layer)

    # ---- accounts

    @property
    def nbytes(self) -> int:
        """Host bytes of the slabs in use."""
        return len(self.store.slabs) * self.store.slab_bytes

    @property
    def device_nbytes(self) -> int:
        """Device bytes of the table of slab addresses."""
        return 0 if self.store._base is None else self.store._base.nbytes

    @property
    def live(self) -> int:
        """Blocks that are held."""
        return len(self._holders)

    @property
    def keys(self) -> Iterable[int]:
        """Those that are held."""
        return self._holders.keys()

    def check(self, keys: list[int]) -> None:
        """Raise AssertionError unless the holders are exactly the tables' `keys`."""
        assert Counter(keys) == self._holders, "host keys and their holders disagree"
        assert self.store.live_rows == self.live, "host rows and keys disagree"
        assert not set(self._free) & self._holders.keys(), "a free key has a holder"

    # ---- pieces

    def _next(self, count: int) -> list[int]:
        """The keys that `count` more blocks will get: lowest first, so that runs stay together."""
        reused = nsmallest(count, self._free) if self._free else []
        end = len(self._holders) + len(self._free)
        return reused + list(range(end, end + count - len(reused)))

    def _move(self, source, target, rows: list[int], places: list[int]) -> None:
        if self.pool.fused is None:
            for layer in range(source.layers):
                target.write(layer, places, source.read(layer, rows))
            return
        ids = (ids_on(x, self.pool.device) for x in (rows, places))
        layers = ([s.layer(n) for n in range(s.layers)] for s in (source, target))
        self.pool.fused.move(*layers, *ids)

    def _by_layer(self, keys: list[int], blocks: list[int]) -> list[Callable[[], None]]:
        """A copy for each layer. The keys may be dropped while these are under way: addresses of
        slabs are those of now."""
        source, target, layers = self.store, self.pool.sealed, range(self.store.layers)
        if self.pool.fused is None:
            return [partial(target.write, n, blocks, source.read(n, keys)) for n in layers]
        base = source.base.clone()
        ids = [ids_on(x, self.pool.device) for x in (keys, blocks)]
        places = [([source.layer(n)._replace(base=base)], [target.layer(n)]) for n in layers]
        return [partial(self.pool.fused.move, *pair, *ids) for pair in places]

    def _dequantize(self, seat: Seat, rows: Tensor) -> tuple[Tensor, Tensor]:
        pool = self.pool
        if pool.fused is not None:
            return pool.gather(seat.planes, rows)
        k, v = pool.format.dequantize(rows_of(seat.planes, rows), pool.dtype)
        return k.flatten(0, 1), v.flatten(0, 1)


def _give_back(slabs: dict[int, Tensor], memory: HostMemory, device: torch.device) -> None:
    """A cache that nobody closed leaves no pinned memory behind."""
    for slab in slabs.values():
        memory.give(slab, device)
    slabs.clear()
