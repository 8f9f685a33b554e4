"""How fast a composition is between the lengths and the batches that were measured.

A decode step reads the weights, works for each sequence, and reads what is stored: for each format
seconds = fixed + each x sequences + read x tokens, fitted to its rows by relative least squares;
between two lengths of as many sequences, what lies between.
What lies in host memory crosses the bus besides, at the rate of the row that was measured so.
Prefill of one sequence: seconds = each x tokens + pair x tokens^2. Of the shapes whose speed was
measured alone: nothing is carried over to others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from kvlab.advice.account import account, held_blocks
from kvlab.advice.table import Speed, speeds
from kvlab.cache import CacheSpec
from kvlab.core import CacheGeometry
from kvlab.model import Outline

SHAPES = (28, 16, 8, 128)  # layers, query heads, key/value heads, head width: Qwen3-0.6B's
PARAMETERS = 596_049_920
ONE_LAUNCH = 8192  # tokens of one sequence up to which one launch decodes all layers


class Estimate(NamedTuple):
    """Tokens a second of all sequences together, and the rows that it lies between."""

    value: float
    rows: tuple[Speed, ...]

    @property
    def sources(self) -> str:
        """`reports/decode_speed, commit 8431ad0`."""
        pairs = dict.fromkeys((row.report, row.commit[:7]) for row in self.rows)
        return "; ".join(f"reports/{report}, commit {commit}" for report, commit in pairs)


def timed_shapes(model: Outline) -> bool:
    """Whether `model` has the shapes whose speed was measured."""
    shapes = model.portrait.shapes
    own = (len(shapes), model.portrait.query_heads, shapes[0].kv_heads, shapes[0].k_width)
    return own == SHAPES and len(set(shapes)) == 1 and model.parameters == PARAMETERS


def decoding(
    options: tuple[str, ...], spec: CacheSpec, g: CacheGeometry, tokens: int, requests: int,
    device: str | None, table: tuple[Speed, ...] | None = None,
) -> Estimate | None:
    """Of captured steps when each of `requests` sequences has `tokens` tokens; None where no rows
    carry it: fewer than three of the format, or of a choice of blocks with it.

    device: None takes any that was measured. table: other rows than those that ship.
    """
    rows = [s for s in (table or speeds()) if s.kind == "decode" and device in (None, s.device)]
    selects = _chooses(options)
    own = [s for s in rows if _format(s.options) == _format(options)
           and _beside(s.options) == selects]  # fmt: skip
    if len(own) < 3:
        return None
    read = tokens if selects else _read(spec, g, tokens)
    step = _step(own, requests, requests * read, options == own[0].options)
    if not spec.offload.keeps:
        return Estimate(requests / step, tuple(own))
    away = account(spec, g, tokens, requests).host
    bus = _bus(rows)
    if selects or bus is None:
        return None
    rate, measured = bus
    there = requests * tokens
    if spec.budget_blocks is not None:
        there = min(there, spec.budget_blocks * g.block_size)
    seconds = _step(own, requests, there) + away / rate
    return Estimate(requests / seconds, (*own, measured))


def prefilling(
    options: tuple[str, ...], spec: CacheSpec, g: CacheGeometry, tokens: int, device: str | None,
    table: tuple[Speed, ...] | None = None,
) -> Estimate | None:
    """Of one prompt of `tokens` tokens in the chunks of the rows; None where no rows carry it, as
    for policies, whose scores take time of their own."""
    rows = [s for s in (table or speeds()) if s.kind == "prefill" and device in (None, s.device)]
    if any(word.startswith("policy=") for word in options) and not (
            spec.offload.keeps or "prefix=hash" in options):  # fmt: skip
        return None
    own = [s for s in rows if _format(s.options) == _format(options) and not _beside(s.options)]
    lengths = {s.tokens for s in own}
    if len(lengths) < 2:
        return None
    each, pair = _fitted([[s.tokens, s.tokens**2] for s in own], [s.tokens / s.value for s in own])
    seen = _read(spec, g, tokens) + (own[0].chunk_tokens or 0) / 2  # its chunk up to itself, too
    pairs = tokens**2 if seen >= tokens / 2 else 2 * tokens * seen
    return Estimate(tokens / (each * tokens + pair * pairs), tuple(own))


def _format(options: tuple[str, ...]) -> list[str]:
    return [o for o in options if o.partition("=")[0].partition(".")[0] == "format"]


def _beside(options: tuple[str, ...]) -> list[str]:
    """Of a row: all that is done beside its format."""
    return [o for o in options if o.partition("=")[0].partition(".")[0] not in ("format", "cache")]


def _chooses(options: tuple[str, ...]) -> list[str]:
    """Of what is asked: the choice of blocks, whose rows stand for themselves."""
    return [o for o in options if o.startswith("retrieval=")]


def _read(spec: CacheSpec, g: CacheGeometry, tokens: int) -> float:
    """Tokens of one sequence that a step reads."""
    if spec.budget_percent is not None:
        return tokens * spec.budget_percent / 100
    if spec.window.middle:
        return tokens
    return held_blocks(spec, g, tokens) * g.block_size + tokens % g.block_size


def _step(rows: list[Speed], requests: int, tokens: float, alone: bool = False) -> float:
    """Seconds of a step over `tokens` tokens in all, by what the rows took: between two lengths of
    as many sequences, else by all of them. alone: a kernel of its own may take all layers; then the
    nearest row that was measured so, and what is read more or less."""
    single = [s for s in rows if _one_launch(s.options, s.batch, s.tokens)]
    several = [s for s in rows if s not in single]
    several = several if len(several) > 2 else rows
    found = _fitted([[1, s.batch, s.batch * s.tokens] for s in several],
                    [s.batch / s.value for s in several])  # fmt: skip
    if alone and single and _one_launch(single[0].options, requests, tokens):
        near = min(single, key=lambda s: abs(s.tokens - tokens))
        return 1 / near.value + float(found[2]) * (tokens - near.tokens)
    like = {s.batch * s.tokens: s.batch / s.value for s in several if s.batch == requests}
    if like and min(like) <= tokens <= max(like):
        return float(np.interp(tokens, sorted(like), [like[n] for n in sorted(like)]))
    return float(np.dot(found, [1, requests, tokens]))


def _one_launch(options: tuple[str, ...], sequences: int, tokens: float) -> bool:
    """Whether a step is a kernel of its own (`kernel/step_cuda`)."""
    return options == ("format=bf16",) and sequences == 1 and tokens <= ONE_LAUNCH


def _fitted(terms: list[list[float]], seconds: list[float]) -> np.ndarray:
    """Coefficients, none negative, with the least sum of squared relative deviations."""
    weighed = np.array(terms, float) / np.array(seconds)[:, None]
    scale = weighed.max(axis=0)
    return nnls(weighed / scale, np.ones(len(seconds)))[0] / scale


def _bus(rows: list[Speed]) -> tuple[float, Speed] | None:
    """Bytes a second from host memory while steps read all that lies there, and whose row says."""
    for row in rows:
        own = [s for s in rows if s.options == tuple(_format(row.options))]
        if row.host_bytes and "offload=host" in row.options and not _chooses(
                row.options) and len(own) >= 3:  # fmt: skip
            there = _step(own, row.batch, row.batch * row.tokens * row.resident_percent / 100)
            return row.host_bytes / (row.batch / row.value - there), row
    return None
