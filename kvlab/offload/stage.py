"""Two device buffers between host memory and attention: one is read while the other fills."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.offload.slabs import HostSlabs
from kvlab.pool import LayerPlanes

DENSE = 1.5  # copy whole runs as long as they hold at most this many rows for each one wanted


class Plan(NamedTuple):
    """How the rows of a list get into a buffer.

    runs: (slab, first row, last row, place in the buffer); None: row by row, packed.
    rows: where each row of the list then lies in the buffer. places: slabs the buffer must hold.
    """

    runs: tuple[tuple[int, int, int, int], ...] | None
    rows: range | tuple[int, ...]
    places: int


@lru_cache(512)
def plan(keys: tuple[int, ...], slab_rows: int) -> Plan:
    """Each layer asks for the same keys, and a full piece is the same at every step."""
    spans: dict[int, list[int]] = {}
    for key in keys:
        slab, row = divmod(key, slab_rows)
        span = spans.setdefault(slab, [row, row + 1])
        span[0], span[1] = min(span[0], row), max(span[1], row + 1)
    if sum(last - first for first, last in spans.values()) > DENSE * len(keys):
        return Plan(None, range(len(keys)), -(-len(keys) // slab_rows))
    place = {slab: n for n, slab in enumerate(spans)}
    rows = tuple(place[key // slab_rows] * slab_rows + key % slab_rows for key in keys)
    runs = tuple((slab, *span, place[slab]) for slab, span in spans.items())
    straight = range(rows[0], rows[0] + len(rows))
    return Plan(runs, straight if rows == tuple(straight) else rows, len(place))


class Seat:
    """One buffer, and the two events that hand it back and forth between the streams.

    holds: (store, layer, keys) of what was copied into it.
    """

    def __init__(self, device: torch.device):
        self.device, self.holds, self.buffer, self.planes = device, None, None, None
        cuda = device.type == "cuda"
        self.arrived, self.used = (torch.cuda.Event() if cuda else None for _ in range(2))

    def fit(self, store: HostSlabs, places: int) -> None:
        """Room for the layer regions of `places` slabs."""
        if self.planes is not None and len(self.planes.slabs) >= places:
            return
        compute = torch.cuda.current_stream(self.device) if self.arrived else None
        if compute and self.buffer is not None:  # torch may hand the old bytes to anybody
            compute.wait_event(self.arrived)
        self.buffer = self.planes = None  # both would not fit under a tight cap
        size = store.layer_bytes
        with torch.inference_mode(False):
            self.buffer = torch.empty(places * size, dtype=torch.uint8, device=self.device)
        if compute:  # and whoever had the new ones may not be done with them
            self.used.record(compute)
        slabs = dict(enumerate(self.buffer.view(places, size)))
        base = torch.tensor([slab.data_ptr() for slab in slabs.values()], dtype=torch.int64)
        self.planes = LayerPlanes(base.to(self.device), slabs, store.slab_rows, store.views())

    @property
    def nbytes(self) -> int:
        return 0 if self.buffer is None else self.buffer.nbytes + self.planes.base.nbytes


class Stage:
    """Starts copies on a stream of its own, two lists of rows ahead at most.

    Shared by those stores of one cache whose layers look alike. A copy waits until what its buffer
    held has been read; a reader waits until its copy is there. Nobody waits on the host.
    """

    def __init__(self, device: torch.device, move=None):
        self.device, self.move = device, move
        self.seats = Seat(device), Seat(device)
        self._next = 0
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.written = torch.cuda.Event() if self.cuda else None
        self._count: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> Stage:
        """Streams and buffers of its own; nothing is under way in them."""
        return Stage(self.device, self.move)

    def start(self, store: HostSlabs, layer: int, keys: tuple[int, ...]) -> Seat:
        """Begin to copy one layer of `keys`, unless that is under way or done."""
        for seat in self.seats:
            if seat.holds == (store, layer, keys):
                return seat
        seat, self._next = self.seats[self._next], 1 - self._next
        way = plan(keys, store.slab_rows)
        seat.fit(store, way.places)
        self._counting(len(keys))  # here: made on the other stream, it would belong to that
        if self.cuda:
            self.stream.wait_event(seat.used)
            self.stream.wait_event(self.written)
        with torch.cuda.stream(self.stream) if self.cuda else nullcontext():
            if way.runs is None:
                self._scattered(store, layer, keys, seat)
            else:
                copy_runs(store, layer, way.runs, seat)
            if self.cuda:
                seat.arrived.record(self.stream)
        seat.holds = store, layer, keys
        return seat

    def take(self, store: HostSlabs, layer: int, keys: tuple[int, ...]) -> tuple[Seat, Tensor]:
        """The buffer with one layer of `keys`, and the int64 [n] rows where they lie in it.

        To be followed by `done(seat)` once the reading kernels are launched.
        """
        seat = self.start(store, layer, keys)
        self._next = 1 - self.seats.index(seat)
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(seat.arrived)
        rows = plan(keys, store.slab_rows).rows
        if isinstance(rows, range):
            return seat, self._counting(rows.stop)[rows.start :]
        return seat, ids_on(rows, self.device)

    def done(self, seat: Seat) -> None:
        """What was launched so far is the last to read `seat`."""
        if self.cuda:
            seat.used.record(torch.cuda.current_stream(self.device))

    def forget(self, wrote: bool) -> None:
        """Rows change their meaning; `wrote`: kernels that write host rows were just launched."""
        for seat in self.seats:
            seat.holds = None
        if self.cuda and wrote:
            self.written.record(torch.cuda.current_stream(self.device))

    @property
    def nbytes(self) -> int:
        """Device bytes of both buffers."""
        return sum(seat.nbytes for seat in self.seats)

    def _scattered(self, store: HostSlabs, layer: int, keys: tuple[int, ...], seat: Seat) -> None:
        if self.move is not None:
            ids = ids_on(keys, self.device)
            self.move([store.layer(layer)], [seat.planes], ids, self._counting(len(keys)))
        else:
            copy_rows(store, layer, keys, seat)

    def _counting(self, count: int) -> Tensor:
        """0 .. count - 1 on the device; kept, because sending a list there costs a wait."""
        if self._count is None or len(self._count) < count:
            size = max(4096, 1 << (count - 1).bit_length())
            self._count = torch.arange(size, dtype=torch.int64, device=self.device)
            if self.cuda:
                torch.cuda.synchronize(self.device)  # once in a while: both streams read it
        return self._count[:count]


def copy_runs(store: HostSlabs, layer: int, runs, seat: Seat) -> None:
    """Whole layer regions, or the wanted part of each plane."""
    for slab, first, last, place in runs:
        source, target = store.region(slab, layer), seat.planes.slabs[place]
        for begin, end in store.spans(first, last):
            target[begin:end].copy_(source[begin:end], non_blocking=True)


def copy_rows(store: HostSlabs, layer: int, keys: tuple[int, ...], seat: Seat) -> None:
    """Row by row, packed from the buffer's start; what `move` does without kernels."""
    rows = store.slab_rows
    for n, key in enumerate(keys):
        source, target = store.region(key // rows, layer), seat.planes.slabs[n // rows]
        here, there = (store.spans(x % rows, x % rows + 1) for x in (key, n))
        for (a, b), (c, d) in zip(here, there):
            target[c:d].copy_(source[a:b], non_blocking=True)


def ids_on(ids, device: torch.device) -> Tensor:
    """int64 [n] on `device`, without waiting: pageable memory is staged before this returns."""
    return torch.tensor(ids, dtype=torch.int64).to(device, non_blocking=True)
