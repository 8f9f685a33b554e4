"""Intervals for what is measured on tokens: a paired bootstrap over documents and blocks of tokens.

Tokens of one text are not independent: neighbours share a context, and whole documents differ. So
what is resampled is, first, documents, and then, within each document drawn, contiguous blocks of
tokens (both with replacement); the interval is the 2.5 and 97.5 percentile of the resampled
statistic. For means two things are corrected. Two full levels would count the noise of blocks twice
(a document's mean carries it already), so document effects are shrunk by the factor that makes the
resampled variance the unbiased one, SSB / (a (a - 1)) for `a` documents (Davison and Hinkley,
Bootstrap Methods and their Application, 1997, section 3.8). And few documents say little about how
documents differ, so the deviations are widened by Student's t over the normal quantile, with
Satterthwaite's degrees of freedom: about 2.2 for three documents that differ, 1 where they do not.
Two documents that differ by more than their blocks explain have one degree of freedom and get no
interval: it would span 13 times their distance. What has bounds (`least`, `most`) keeps to them:
deviations are taken on the scale of the logarithm or log-odds, equal to first order.
With one document only blocks are resampled, and the interval speaks for that document alone.
Quantiles use the two full levels, which errs on the wide side.

Everywhere: `values` is one array per document; the result is an Interval (value, low, high) with
low <= value <= high, repeatable by its seed; low and high are None where there is a single block
and so no spread to see. Raises ValueError for no tokens at all or arrays that do not pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from kvlab.stats.resample import LEVEL, blocks_of, deviations, draw, positions, rank


class Interval(NamedTuple):
    value: float
    low: float | None
    high: float | None


def paired_ratio_percent(
    nll: Sequence[np.ndarray], baseline: Sequence[np.ndarray], *, block=256, resamples=2000, seed=0
) -> Interval:
    """By how many percent the perplexity of `nll` exceeds that of `baseline`.

    Both are negative log-likelihoods in nats of the same tokens, so only their difference is
    resampled: what makes a text hard cancels. 100 * (exp(mean(nll - baseline)) - 1).
    """
    differences = _pair(nll, baseline)
    mean = mean_interval(differences, block=block, resamples=resamples, seed=seed)
    return _map(mean, lambda x: float(100 * np.expm1(x)))


def perplexity_interval(
    nll: Sequence[np.ndarray], *, block=256, resamples=2000, seed=0
) -> Interval:
    """exp(mean nll). This is the interval of one perplexity; compare two with the paired one."""
    mean = mean_interval(nll, block=block, resamples=resamples, seed=seed)
    return _map(mean, lambda x: float(np.exp(x)))


def proportion_percent(
    flags: Sequence[np.ndarray], *, block=256, resamples=2000, seed=0
) -> Interval:
    """How many percent of the flags are true.

    Where all agree no resample can differ; then the interval is Clopper and Pearson's exact one,
    which takes the tokens as independent.
    """
    flags = [np.asarray(f, dtype=np.float64) for f in flags]
    mean = mean_interval(flags, block=block, resamples=resamples, seed=seed, least=0.0, most=1.0)
    if mean.value in (0.0, 1.0):
        count = sum(f.size for f in flags)
        exact = stats.binomtest(round(mean.value * count), count).proportion_ci(LEVEL, "exact")
        mean = Interval(mean.value, float(exact.low), float(exact.high))
    return _map(mean, lambda x: 100 * x)


def mean_interval(
    values: Sequence[np.ndarray], *, block=256, resamples=2000, seed=0,
    least: float | None = None, most: float | None = None,
) -> Interval:
    """The mean over all tokens (long documents weigh more); least, most: bounds of a value."""
    blocks = blocks_of(values, block)
    value = float(blocks.sums.sum() / blocks.sizes.sum())
    if len(blocks.sizes) == 1:
        return Interval(value, None, None)
    if not np.isfinite(own := deviations(blocks, value)).all():
        return Interval(value, None, None)
    counts = draw(blocks.document, resamples, seed)
    moved = counts @ own / (counts @ blocks.sizes)
    return _percentiles(value, _within(value, moved, least, most))


def _within(
    value: float, deviations: np.ndarray, least: float | None, most: float | None
) -> np.ndarray:
    """`value` + `deviations`, bent so that none passes a bound; equal to first order."""
    if least is None or value <= least or (most is not None and value >= most):
        return value + deviations
    above = value - least
    if most is None:  # the logarithm, for what lies below: above it nothing is in the way
        bent = least + above * np.exp(np.minimum(deviations, 0) / above)
        return np.where(deviations < 0, bent, value + deviations)
    odds = above / (most - value)
    bent = odds * np.exp(np.clip(deviations * (most - least) / (above * (most - value)), -700, 700))
    return least + (most - least) * bent / (1 + bent)


def quantile_interval(
    values: Sequence[np.ndarray], q: float, *, block=256, resamples=2000, seed=0
) -> Interval:
    """The smallest value that a share `q` of tokens does not exceed (0.99, 0.999; 1: the maximum).

    No resample exceeds the largest value seen: for `q` = 1, and wherever fewer than about ten
    tokens lie above the quantile, read `high` as "at least".
    """
    if not 0 < q <= 1:
        raise ValueError(f"q must lie in (0, 1], not {q}")
    blocks = blocks_of(values, block)
    flat = np.concatenate([np.asarray(v, dtype=np.float64) for v in values])
    order = np.argsort(-flat, kind="stable")
    point = float(flat[order[rank(q, flat.size) - 1]])
    if len(blocks.sizes) == 1:
        return Interval(point, None, None)
    counts = draw(blocks.document, resamples, seed)
    block_of = np.repeat(np.arange(len(blocks.sizes)), blocks.sizes)[order]
    ranks = rank(q, counts @ blocks.sizes)
    return _percentiles(point, flat[order][positions(counts, block_of, ranks)])


def position_intervals(
    nll: Sequence[np.ndarray],
    baseline: Sequence[np.ndarray],
    *,
    buckets=16,
    first=0,
    block=64,
    resamples=1000,
    seed=0,
) -> dict[str, np.ndarray]:
    """Where in the text the loss arises: mean nll difference in nats for each bucket of positions.

    `first` is the position of each document's first value. Returns arrays [P] `position` (middle of
    the bucket), `nll_delta`, `low`, `high` (NaN where a bucket holds a single block), which is what
    RunFolder.curve takes.
    """
    differences = _pair(nll, baseline)
    longest = max(d.size for d in differences)
    edges = np.unique(np.linspace(0, longest, buckets + 1).round().astype(int))
    rows = []
    for low, high in zip(edges[:-1], edges[1:]):
        inside = [d[low:high] for d in differences if d.size > low]
        found = mean_interval(inside, block=block, resamples=resamples, seed=seed)
        rows.append([first + (low + high - 1) / 2, *found])
    columns = np.array(rows, dtype=np.float64).T
    return dict(zip(("position", "nll_delta", "low", "high"), columns))


def ratio_interval(
    parts: Sequence[float], wholes: Sequence[float], *, resamples=1000, seed=0
) -> Interval:
    """sum(parts) / sum(wholes) over independent units, such as hits and accesses of sessions.

    scipy's percentile bootstrap, a part drawn together with its whole.
    """
    parts, wholes = (np.asarray(values, dtype=np.float64) for values in (parts, wholes))
    value = float(parts.sum() / wholes.sum()) if wholes.sum() else 0.0
    if len(parts) < 2 or not wholes.sum():
        return Interval(value, None, None)
    if not np.ptp(parts - value * wholes):
        return Interval(value, value, value)

    def ratio(part, whole, axis):
        return part.sum(axis) / np.maximum(whole.sum(axis), 1e-300)

    found = stats.bootstrap(
        (parts, wholes), ratio, paired=True, n_resamples=resamples, batch=100,
        method="percentile", rng=seed,
    ).confidence_interval  # fmt: skip
    return _ordered(value, float(found.low), float(found.high))


def _pair(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> list[np.ndarray]:
    if [np.size(x) for x in a] != [np.size(y) for y in b]:
        raise ValueError("the two sides do not hold the same tokens: lengths differ")
    return [np.asarray(x, np.float64) - np.asarray(y, np.float64) for x, y in zip(a, b)]


def _percentiles(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return _ordered(value, float(low), float(high))


def _ordered(value: float, low: float, high: float) -> Interval:
    return Interval(value, min(low, value), max(high, value))


def _map(interval: Interval, rising: Callable[[float], float]) -> Interval:
    """The same interval on another scale; percentiles keep their order under a rising function."""
    return Interval(*(None if end is None else rising(end) for end in interval))
