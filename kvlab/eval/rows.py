"""Measurements with intervals, of scores that are paired by item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kvlab import stats
from kvlab.core import Measurement


def interval(name: str, found: stats.Interval, unit: str, better: str | None, count: int):
    return Measurement(name, found.value, unit, better, found.low, found.high, count)


def size(column: Sequence[np.ndarray]) -> int:
    return sum(map(len, column))


def share(name: str, scores: list[np.ndarray], seed: int) -> Measurement:
    """Scores from 0 to 1 in percent; the bootstrap's interval, cut to what a share can be."""
    found = stats.proportion_percent([np.concatenate(scores)], block=1, seed=seed)
    return interval(name, cut(found, 0.0), "%", "higher", size(scores))


def cut(found: stats.Interval, least: float) -> stats.Interval:
    """Percent or points: the ends where no bootstrap should have gone, `least` and 100."""
    ends = (None if end is None else min(100.0, max(least, end)) for end in found[1:])
    return stats.Interval(found.value, *ends)


def points(name: str, scores: list[np.ndarray], others: list[np.ndarray], seed: int) -> Measurement:
    """The paired difference of two columns of scores."""
    return interval(name, paired(scores, others, seed), "points", "higher", size(scores))


def paired(scores: list[np.ndarray], others: list[np.ndarray], seed: int) -> stats.Interval:
    """The difference in percentage points.

    Where all questions differ alike no resample can; then the exact binomial bound on the share of
    questions that would not stands on both sides.
    """
    differences = 100 * (np.concatenate(scores) - np.concatenate(others))
    if np.ptp(differences):
        return cut(stats.mean_interval([differences], block=1, seed=seed), -100.0)
    bound, value = 100 * (1 - 0.025 ** (1 / len(differences))), float(differences[0])
    return cut(stats.Interval(value, value - bound, value + bound), -100.0)


def memory(runner) -> Iterator[Measurement]:
    """Bytes at the end of an item (the largest one), and the peak on the way."""
    end = max(runner.stats, key=lambda s: s.allocated_bytes)
    for name in ("nominal", "logical", "allocated", "host"):
        value = getattr(end, f"{name}_bytes")
        yield Measurement(f"cache_{name}_bytes", value, "B", "lower", count=end.tokens)
    yield Measurement("cache_peak_bytes", runner.peak_bytes, "B", "lower", count=end.tokens)
    for name in ("bits_per_element", "effective_bits"):
        yield Measurement(name, getattr(end, name), "bit", "lower", count=end.tokens)
    resident = end.resident_tokens_percent
    yield Measurement("resident_tokens_percent", resident, "%", None, count=end.tokens)
    yield Measurement("evictions", end.evictions, "blocks", None, count=end.tokens)
    if end.summary_fallbacks:
        fallbacks = end.summary_fallbacks
        yield Measurement("summary_fallbacks", fallbacks, "heads", "lower", count=end.tokens)


def awaited_last(found: list[Measurement], awaited: str) -> list[Measurement]:
    """`found` for one writing: a kill may tear it, and then `awaited` must not be there yet."""
    return sorted(found, key=lambda row: row.name == awaited)
