"""Axis `retrieval`: which blocks of the past a decoded token reads.

Each layer's key/value head chooses for itself, among all sealed blocks of the sequence, by a score
between the query and a digest of the block's keys. A step of several tokens (a prefill chunk) reads
everything, exactly. Nothing is forgotten: what one token does not read, the next one may.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kvlab import axes, kinds
from kvlab.core import BadInput, checked_seed

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}


@kinds.members("retrieval")
class NoRetrieval:
    """All of them."""

    name = "none"
    selects = False  # whether a decoded token reads a choice of blocks only
    control = False  # whether it is itself what other members have to beat


class Retrieval(NoRetrieval):
    """The best blocks within a budget; a member says what a block's digest is.

    budget_tokens: sealed tokens that one head reads for a decoded token (default 2048), those that
        are always read included; the open block comes on top. A context that fits is read whole,
        so that results are those without retrieval.
    sinks, recent: tokens at the head (4) and at the end (256) that are always read, as whole
        blocks.
    group: `max` or `sum` of the scores of the query heads that share a key/value head.
    per_head: each key/value head chooses for itself; off, a layer's heads choose together.
    digests: how digests are stored, `bf16`, `fp8` or `fp32`. They stay on the device.
    listen: decoded tokens between two looks at what was chosen (16): the eviction policy hears of
        it, and blocks that are chosen often come back from host memory.
    fetches: at most so many of them each time (32); 0: host blocks are read where they are.
    """

    selects = True
    sides = 1  # rows of a digest

    def __init__(
        self, budget_tokens: int = 2048, sinks: int = 4, recent: int = 256, group: str = "max",
        per_head: bool = True, digests: str = "bf16", listen: int = 16, fetches: int = 32,
    ):
        for key, value, least in (
            ("budget_tokens", budget_tokens, 1), ("sinks", sinks, 0), ("recent", recent, 0),
            ("listen", listen, 1), ("fetches", fetches, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadInput(f"retrieval.{key}", value,
                               f"must be a whole number, at least {least}")
        if group not in ("max", "sum"):
            raise BadInput("retrieval.group", group, "must be max or sum")
        if digests not in DTYPES:
            raise BadInput("retrieval.digests", digests, "must be " + ", ".join(DTYPES))
        self.budget_tokens, self.sinks, self.recent = budget_tokens, sinks, recent
        self.group, self.per_head = group, per_head
        self.digests, self.listen, self.fetches = digests, listen, fetches

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.digests]

    def digest(self, k: Tensor) -> Tensor:
        """Digests [N, H, C, D] of the keys [N, S, H, D] of N blocks, C being `sides`."""
        raise NotImplementedError

    def blocks(self, block_size: int) -> tuple[int, int, int]:
        """Blocks read in all, at the head and at the end.

        Raises `BadInput` where the budget holds no more than what is always read.
        """
        keep = self.budget_tokens // block_size
        first, last = -(-self.sinks // block_size), -(-self.recent // block_size)
        if keep <= first + last:
            raise BadInput("retrieval.budget_tokens", self.budget_tokens,
                           f"must exceed the {(first + last) * block_size} tokens that are always "
                           f"read (sinks and recent, in whole blocks of {block_size})")
        return keep, first, last


class Quest(Retrieval):
    """Channel-wise maximum and minimum of a block's keys, an upper bound of any product with them.

    Quest (Tang et al. 2024, https://arxiv.org/abs/2406.10774).
    Differs: one choice for the query heads that share keys, sinks and recent blocks are always
    read, all layers retrieve (the paper reads all of the first two), and bounds are rounded to
    the digests' dtype, to nearest.
    """

    name = "quest"
    sides = 2

    def digest(self, k):
        return torch.stack([k.amax(1), k.amin(1)], 2)


class MeanKey(Retrieval):
    """The mean of a block's keys: half the bytes of `quest`, blind to a single token that differs.

    As the block representatives of InfLLM (https://arxiv.org/abs/2402.04617) and the centroids of
    RetroInfer (https://arxiv.org/abs/2505.02922), without their clustering.
    """

    name = "mean_key"

    def digest(self, k):
        return k.float().mean(1)[:, :, None]


class RandomChoice(Retrieval):
    """Digests that are noise: the same bytes and the same code as `mean_key`, a choice by chance.

    The negative control: what sinks, recent blocks and luck are worth.
    seed: of the noise.
    """

    name = "random"
    control = True

    def __init__(
        self, budget_tokens: int = 2048, sinks: int = 4, recent: int = 256, group: str = "max",
        per_head: bool = True, digests: str = "bf16", listen: int = 16, fetches: int = 32,
        seed: int = 0,
    ):
        super().__init__(
            budget_tokens, sinks, recent, group, per_head, digests, listen, fetches
        )
        self.seed = checked_seed("retrieval.seed", seed)
        self._noise: dict[torch.device, torch.Generator] = {}

    def digest(self, k):
        blocks, _, heads, dim = k.shape
        if k.device not in self._noise:
            self._noise[k.device] = torch.Generator(k.device).manual_seed(self.seed)
        return torch.randn(blocks, heads, 1, dim, device=k.device, generator=self._noise[k.device])


by_name = partial(axes.by_name, "retrieval")
