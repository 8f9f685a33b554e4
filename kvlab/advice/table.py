"""What formats were measured to lose: rows that ship with kvlab, `assets/advice/losses.jsonl`.

`experiments/advice/table.py` makes them from run folders.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

ASSET = Path(__file__).resolve().parents[1] / "assets" / "advice" / "losses.jsonl"
BLOCK_SIZE, CHUNK_TOKENS = 128, 512  # as all rows were measured: both are part of a lossy method


class Figure(NamedTuple):
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    def told(self, form: str) -> str:
        """`0.40 [0.23, 0.59]`, its numbers in the format `form`."""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


class Loss(NamedTuple):
    """One format on one model against its full cache in bf16.

    options: words that choose it. setting: documents, tokens, chunks, blocks, dtype. bits: stored
    ones of an element, scales included. perplexity: change in %. kl: mean, nats. top1: agreement
    in %. loaded: the machine had other work, so that its speed is no figure to plan by.
    kernels: whether kernels read the blocks, or plain torch did.
    """

    model: str
    setting: str
    options: tuple[str, ...]
    bits: float
    perplexity: Figure
    kl: Figure | None
    top1: Figure | None
    allocated_bytes: int
    prefill_tokens_per_second: float | None
    loaded: bool
    kernels: bool
    device: str
    commit: str


@cache
def losses(path: Path = ASSET) -> tuple[Loss, ...]:
    """All rows, in the order of the file."""
    return tuple(map(_loss, path.read_text(encoding="utf-8").splitlines()))


def _loss(line: str) -> Loss:
    row = json.loads(line)
    for name in ("perplexity", "kl", "top1"):
        row[name] = Figure(*row[name]) if row[name] else None
    return Loss(**row | {"options": tuple(row["options"])})


def models() -> list[str]:
    """Those that were measured."""
    return list(dict.fromkeys(row.model for row in losses()))


def measured(options: tuple[str, ...]) -> list[Loss]:
    """The rows of a format, one for each model."""
    return [row for row in losses() if row.options == options]


def formats() -> list[tuple[str, ...]]:
    """Options of the formats that were measured."""
    return list(dict.fromkeys(row.options for row in losses()))
