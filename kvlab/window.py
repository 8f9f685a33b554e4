"""Axis `window`: which tokens of a sequence are protected, and which may be read.

All ranges are half-open token ranges [begin, end), sorted, disjoint and not empty.
"""

from __future__ import annotations

from functools import partial

from kvlab import axes, kinds
from kvlab.core import BadInput

Range = tuple[int, int]


@kinds.members("window")
class NoWindow:
    """Everything may be read, nothing is protected from the eviction policy."""

    name = "none"
    middle = True  # whether what is not protected may be read while it is held
    rerotate = False  # whether kept tokens are read as if they stood side by side

    def protected(self, length: int) -> list[Range]:
        """Tokens whose blocks stay pinned in a sequence of `length` tokens."""
        return []

    def readable(self, length: int) -> list[Range]:
        """Tokens that attention may read, as far as their blocks are held."""
        return [(0, length)] if length else []


class SinkWindow(NoWindow):
    """The first tokens, which catch surplus attention, and the recent ones stay.

    StreamingLLM (Xiao et al. 2023, https://arxiv.org/abs/2309.17453).
    sinks: tokens at the head (default 4); recent: tokens at the end (1024).
    middle: whether tokens between the two are read while the policy keeps them. True: the policy
    and the budget decide (FIFO makes it StreamingLLM with a larger recent part, policy=h2o
    makes it H2O). False: the window alone decides, blocks that leave it can be freed at once.
    rerotate: whether the kept tokens are read as if they stood side by side, as in the paper, so
    that no distance exceeds the window; needs middle=False. False: original positions.
    Differs: protection covers whole blocks that it touches.
    """

    name = "sink"

    def __init__(
        self, sinks: int = 4, recent: int = 1024, middle: bool = True, rerotate: bool = False
    ):
        for key, value, least in (("sinks", sinks, 0), ("recent", recent, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadInput(f"window.{key}", value, f"must be a whole number, at least {least}")
        if rerotate and middle:
            raise BadInput("window.rerotate", rerotate, "needs window.middle=false, where the "
                           "window alone decides which tokens stand side by side")
        self.sinks, self.recent, self.middle, self.rerotate = sinks, recent, middle, rerotate

    def protected(self, length):
        begin = length - self.recent
        if begin <= self.sinks:
            return super().readable(length)
        return [(0, self.sinks), (begin, length)] if self.sinks else [(begin, length)]

    def readable(self, length):
        return super().readable(length) if self.middle else self.protected(length)


by_name = partial(axes.by_name, "window")
