"""Jobs that measure point after point: speeds, kernels, serving. Nothing is paired."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from kvlab.core import BadInput, Measurement, Variant
from kvlab.model import LoadedModel, model_geometry, prepare_device
from kvlab.progress import Work, total


class Batch(NamedTuple):
    """Rows that are written at once, under settings beside those of their point."""

    params: dict
    rows: list[Measurement]


class Point(NamedTuple):
    """What is measured under one name and setting; `measure` is called if the folder lacks it."""

    variant: str
    params: dict
    measure: Callable[[], Iterable[Measurement | Batch]]


class Sweep:
    """A member says its `points`; this class leaves out what the folder holds, makes a row of what
    raises, writes the rest and gives memory back between points.

    own_list: what a job without variants is told that by. may_not_fit: a point for which there is
    no memory, or no library, is left out and said, and no failure.
    holds_nothing: all points can be listed before one is measured, so the time left is known; those
    of other jobs hold tensors from the moment they are made, and say `ahead` what will come.
    """

    wants_specs = False
    own_list = "this job makes its own"
    may_not_fit = False
    holds_nothing = False
    device: str = "auto"
    cap_gb: float | None = None

    def points(self, device: torch.device, variants: Sequence[Variant]) -> Iterator[Point]:
        raise NotImplementedError

    def ahead(self, device: torch.device, variants: Sequence[Variant]) -> Iterable[tuple]:
        """Name and place (`tokens`, `batch`) of each point to come, before one is made."""
        return ()

    def weight(self, params: dict) -> float:
        """How much work a point with these settings is, in any unit."""
        return 1.0

    @torch.inference_mode()
    def run(self, folder, variants: Sequence[Variant] = ()) -> None:
        """Measure whatever `folder` does not hold yet."""
        if variants and not self.wants_specs:
            raise BadInput("variants", len(variants), self.own_list)
        device = prepare_device(self.device, self.cap_gb)
        points = self.points(device, variants)
        with total(True, type(self).__name__) as bar:
            if self.holds_nothing:
                points = [p for p in points if not folder.done(p.variant, p.params)]
            for name, params in self._to_come(points, device, variants):
                bar.work.plan(place(params), name, {"point": self.weight(params)})
            for point in points:
                self._one(folder, point, bar.work)
                bar.show()
                if device.type == "cuda":
                    torch.cuda.empty_cache()

    def _to_come(self, points, device, variants: Sequence[Variant]) -> Iterable[tuple[str, dict]]:
        if self.holds_nothing:
            return [(point.variant, point.params) for point in points]
        return self.ahead(device, variants)

    def _one(self, folder, point: Point, work: Work) -> None:
        """Measure a point that the folder lacks; one that it has takes no time."""
        where = place(point.params)
        if folder.done(point.variant, point.params):
            work.drop(point.variant, where)
            return
        with folder.surviving(point.variant, point.params):
            self._measure(folder, point)
        work.spend(where, point.variant, "point")
        work.done(where, point.variant, {"point": self.weight(point.params)})

    def _measure(self, folder, point: Point) -> None:
        try:
            rows = []
            for one in point.measure():
                if isinstance(one, Batch):
                    folder.add(point.variant, point.params | one.params, one.rows)
                else:
                    rows.append(one)
            folder.add(point.variant, point.params, rows)
        except (torch.OutOfMemoryError, ImportError) as error:
            if not self.may_not_fit:
                raise
            reason = "does not fit" if isinstance(error, RuntimeError) else "is not installed"
            print(f"{point.variant}, {place(point.params)}: {reason}, left out", flush=True)


def place(params: dict) -> str:
    """`batch 1, tokens 1024`: which point of a variant it is; `points` where it has only one."""
    return ", ".join(f"{k} {params[k]}" for k in ("batch", "tokens") if k in params) or "points"


def needs_cuda(device: torch.device, job: str) -> None:
    if device.type != "cuda":
        raise BadInput("device", device.type, f"job={job} times kernels and needs a CUDA device")


def check_variants(loaded: LoadedModel, variants: Sequence[Variant]) -> None:
    """Refuse what does not fit the model's shape before anything is measured."""
    for variant in variants:
        variant.spec.checked_for(model_geometry(loaded.model, variant.spec))


def at_least(least: int, **settings: int) -> None:
    """Raises `BadInput` for a number, or a list of numbers, that is smaller, or for no numbers."""
    for name, value in settings.items():
        several = [value] if isinstance(value, int) else list(value)
        if not several or min(several) < least:
            raise BadInput(name, value, f"must be at least {least}")


def check_peers(peers: Sequence[str], known: Iterable[str]) -> None:
    for peer in peers:
        if peer not in known:
            raise BadInput("peers", peer, f"known: {', '.join(known)}")
