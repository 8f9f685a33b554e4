"""Rows on their way into a store, a copy for each layer, while the layers before are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class NothingComing:
    """All rows are there: the null member."""

    def need(self, layer: int) -> None:
        """The stream that computes is about to read, or write, rows of `layer`."""

    def settle(self) -> None:
        """It is about to touch rows of any layer, or their memory goes."""


class Here:
    """Where nothing runs beside: a copy is made at once."""

    def begin(self) -> None:
        """What was launched so far is done."""

    def run(self, copy: Callable[[], None]):
        """Start a copy; a ticket to wait with, which stands for all copies before, too."""
        copy()

    def wait(self, ticket) -> None:
        """What is launched from now on waits for it."""

    def finish(self, ticket) -> None:
        """The host waits for it."""


class Beside(Here):
    """A stream of its own on a CUDA device: copies run in order, beside what is computed."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def begin(self):
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def run(self, copy):
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            copy()
            arrived.record(self.stream)
        return arrived

    def wait(self, ticket):
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def finish(self, ticket):
        ticket.synchronize()


def lane_for(device: torch.device) -> Here:
    return Beside(device) if device.type == "cuda" else Here()


class Coming(NothingComing):
    """Copies on `lane`, one for each layer of a store, in order."""

    def __init__(self, lane: Here):
        self.lane = lane
        self._copies: Sequence[Callable] = ()  # what they hold stays until they are done
        self._tickets: list = []
        self._due = 0  # the first layer that nobody has waited for

    def start(self, copies: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """Begin all of them, behind what was launched so far; gives a call with which the host
        waits for the last."""
        self.lane.begin()
        self._copies, self._due = copies, 0
        self._tickets = [self.lane.run(copy) for copy in copies]
        lane, last = self.lane, self._tickets[-1]
        return lambda: lane.finish(last)

    def need(self, layer):
        if self._due <= layer < len(self._tickets):
            self.lane.wait(self._tickets[layer])
            self._due = layer + 1
            if self._due == len(self._tickets):
                self._copies, self._tickets = (), []

    def settle(self):
        self.need(len(self._tickets) - 1)

    def __deepcopy__(self, memo: dict) -> Coming:
        """Of a copied store, whose rows are all there."""
        return Coming(self.lane)
