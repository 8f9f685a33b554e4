"""Policies that weigh what is known of a block: Priority and Hybrid."""

from __future__ import annotations

from math import inf, log2

from kvlab.core import BadInput, check_number
from kvlab.policy.base import PriorityPolicy
from kvlab.policy.leaves import LeafFirst


class Priority(PriorityPolicy):
    """Levels given by the user come first, then the head of the prefix, then recency.

    As the request priorities of SGLang and TensorRT-LLM; no paper. Within a level the prefix stays
    longer than the recent, the recent longer than the old.
    prefix_blocks: blocks of smaller depth are prefix, such as a system prompt (default 0: none).
    """

    name = "priority"

    def __init__(self, prefix_blocks: int = 0):
        super().__init__()
        if prefix_blocks < 0:
            raise BadInput("policy.prefix_blocks", prefix_blocks, "must be at least 0")
        self.prefix_blocks = prefix_blocks

    def priority(self, meta):
        return meta.level, meta.depth < self.prefix_blocks, meta.last


class Worth(PriorityPolicy):
    """The order of `Hybrid` among leaves."""

    def __init__(self, half_life: float, frequency: float, cost: float):
        super().__init__()
        self.half_life, self.frequency, self.cost = half_life, frequency, cost

    def priority(self, meta):
        worth = meta.last / self.half_life + self.frequency * log2(1 + meta.hits)
        return worth + self.cost * log2(max(meta.cost / meta.size, 1e-30))


class Hybrid(LeafFirst):
    """The product of recency, frequency and recompute cost, each to a power of the user's choice.

    A block is worth 2^(-age / half_life) x (1 + hits)^frequency x (cost / size)^cost; the least
    worth leaves, by leaves, since deep blocks cost most and hit nothing without their prefix. In
    logarithms all blocks age alike, so that the order stands still while nothing is touched and a
    heap keeps it: the exponential decay of LRFU (Lee et al. 2001,
    https://doi.org/10.1109/TC.2001.970573) with the cost term of Marconi
    (https://arxiv.org/abs/2411.19379).
    half_life: steps (blocks sealed or touched) after which an unused block is worth half (10000).
    frequency, cost: the powers (1, 1); 0 leaves a term out, less than 0 turns it round.
    Differs from LRFU: hits do not fade one by one, the whole block does.
    """

    name = "hybrid"

    def __init__(self, half_life: float = 10_000.0, frequency: float = 1.0, cost: float = 1.0):
        check_number("policy.half_life", half_life, 0, whole=False, above=True)
        check_number("policy.frequency", frequency, -inf, whole=False)
        check_number("policy.cost", cost, -inf, whole=False)
        super().__init__(Worth(half_life, frequency, cost))
