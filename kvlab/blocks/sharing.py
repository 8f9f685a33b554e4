"""Members of axis `prefix`: whether sequences that begin alike share blocks."""

from __future__ import annotations

from functools import partial

from kvlab import axes, kinds


@kinds.members("prefix")
class NoSharing:
    """Every sequence computes and holds all its blocks."""

    name = "none"
    shares = False  # whether blocks outlive their sequence
    hold = False
    outputs = False


class HashSharing(NoSharing):
    """Blocks are found again by chained hashes of their tokens, and outlive their sequence.

    As vLLM's automatic prefix caching (https://arxiv.org/abs/2309.06180): whole blocks only, the
    last token of a prompt is always computed. A block is known once its prompt is computed, and
    only if there was no hole before it, since what it holds depends on all that its tokens saw.
    hold: running sequences keep their blocks, as a server does, and the policy chooses among what
        nobody uses. False: the policy may take blocks of running sequences, too (lossy
        compression), and what is computed behind such a hole is not shared.
    outputs: decoded tokens are kept as well as prompts, for the next turn of a chat.
    """

    name = "hash"
    shares = True

    def __init__(self, hold: bool = True, outputs: bool = True):
        self.hold, self.outputs = hold, outputs


by_name = partial(axes.by_name, "prefix")
