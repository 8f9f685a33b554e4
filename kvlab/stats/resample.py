"""Documents and blocks of tokens, drawn again: what the intervals of `kvlab.stats` stand on.

Two levels: documents with replacement, then contiguous blocks of tokens within each. How the levels
are scaled and widened stands in `kvlab.stats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
FEWEST = 1.5  # degrees of freedom of an interval


class Blocks(NamedTuple):
    """Contiguous blocks of all documents: their sums, sizes in tokens, and documents, each [K]."""

    sums: np.ndarray
    sizes: np.ndarray
    document: np.ndarray


def blocks_of(values: Sequence[np.ndarray], block: int) -> Blocks:
    arrays = [np.asarray(v, dtype=np.float64) for v in values]
    if block < 1 or sum(a.size for a in arrays) == 0:
        raise ValueError("an interval needs at least one token and a block of at least one")
    starts = [np.arange(0, a.size, block) for a in arrays]
    return Blocks(
        np.concatenate([np.add.reduceat(a, s) for a, s in zip(arrays, starts) if a.size]),
        np.concatenate([np.diff(s, append=a.size) for a, s in zip(arrays, starts) if a.size]),
        np.repeat(np.arange(len(arrays)), [len(s) for s in starts]),
    )


def draw(document: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each block was drawn, [resamples, K]: documents first, then blocks within each."""
    held = np.unique(document, return_counts=True)[1]
    return _drawn(tuple(held.tolist()), resamples, seed)


@lru_cache(maxsize=8)
def _drawn(held: tuple[int, ...], resamples: int, seed: int) -> np.ndarray:
    """Of documents that hold so many blocks: the same for every variant and statistic of a run.
    Read-only, float64 of whole numbers, so that products with it are the library's."""
    rng = np.random.default_rng(seed)
    documents = rng.multinomial(len(held), np.full(len(held), 1 / len(held)), size=resamples)
    counts = np.hstack(
        [rng.multinomial(times * k, np.full(k, 1 / k)) for times, k in zip(documents.T, held)]
    ).astype(np.float64)
    counts.flags.writeable = False
    return counts


def deviations(blocks: Blocks, mean: float) -> np.ndarray:
    """Block sums [K] around `mean`, their two levels scaled as the module's text says.

    Exactly zero for identical values.
    """
    _, document, held = np.unique(blocks.document, return_inverse=True, return_counts=True)
    size = np.bincount(document, blocks.sizes)
    effects = np.bincount(document, blocks.sums - mean * blocks.sizes) / size
    residuals = blocks.sums - (mean + effects[document]) * blocks.sizes
    inflate = held / np.maximum(held - 1, 1)  # of a variance estimated from `held` blocks
    # Variances of the mean of documents, each weighed alike: what blocks explain, and all.
    count = len(held)
    within = (inflate * np.bincount(document, residuals**2) / size**2).sum() / count**2
    between = (effects**2).sum() / count**2
    total = max(within, between * count / max(count - 1, 1) if count > 1 else 0.0)
    shrink = ((total - within) / between) ** 0.5 if between else 0.0
    scaled = shrink * effects[document] * blocks.sizes + residuals * inflate[document] ** 0.5
    if total <= 1e-24 * mean**2:  # rounding of equal values
        return scaled
    return scaled * _widen(total - within, within, count - 1, len(document) - count)


def _widen(between: float, within: float, df_between: int, df_within: int) -> float:
    """Student's t over the normal's at Satterthwaite's degrees of freedom; infinite if too few."""
    spread = sum(v**2 / df for v, df in ((between, df_between), (within, df_within)) if df)
    if not spread > 0:
        return 1.0
    tail, freedom = (1 + LEVEL) / 2, (between + within) ** 2 / spread
    return float(stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)) if freedom >= FEWEST else np.inf


def rank(q: float, count):
    """Which value, counted from the largest (1), is the quantile among `count`."""
    return count - np.ceil(np.round(q * count, 6)).astype(int) + 1


def positions(counts: np.ndarray, block_of: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Index into the descending order at which each resample reaches its rank, [resamples].

    Only the head of the order is looked at: high quantiles need few of many tokens. How many tokens
    a resample has drawn by the end of each stretch of it is one product; then one stretch is left.
    """
    head, total = 2 * int(ranks.max()) + 1000, len(block_of)
    while True:
        head = min(total, head)
        width = max(1, int(head**0.5))
        ends = np.arange(width, head + width, width)
        stretch = np.minimum(np.arange(head) // width, len(ends) - 1)
        held = np.zeros((counts.shape[1], len(ends)))
        np.add.at(held, (block_of[:head], stretch), 1)
        by = counts @ held.cumsum(1)  # [resamples, stretches], whole numbers
        if head == total or (by[:, -1] >= ranks).all():
            break
        head *= 2
    first = (by >= ranks[:, None]).argmax(1)
    before = np.where(first > 0, np.take_along_axis(by, (first - 1)[:, None], 1)[:, 0], 0)
    at = np.minimum(first[:, None] * width + np.arange(width), head - 1)  # past it: never first
    seen = np.cumsum(np.take_along_axis(counts, block_of[at], 1), axis=1) + before[:, None]
    return at[np.arange(len(ranks)), (seen >= ranks[:, None]).argmax(1)]
