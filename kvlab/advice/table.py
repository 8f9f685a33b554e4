"""What was measured: losses of formats and of eviction, and speeds. They ship with kvlab in
`assets/advice/`.

`experiments/advice/table.py` makes the files from the reports of this repository.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "advice"
ASSET, EVICTIONS, PARTIAL, SPEEDS = (
    ASSETS / f"{n}.jsonl" for n in ("losses", "evictions", "partial", "speeds"))  # fmt: skip
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


class Speed(NamedTuple):
    """One cache in one table of speeds.

    options: words that choose it. kind: `decode` or `prefill`, value in tokens a second (decode: of
    all sequences together). tokens: in the cache of each of `batch` sequences. model: whose shapes.
    chunk_tokens: of prefill. host_bytes, resident_percent: what lay in host memory, and how many of
    the tokens did not.
    """

    report: str
    model: str
    options: tuple[str, ...]
    kind: str
    tokens: int
    batch: int
    value: float
    device: str
    commit: str
    chunk_tokens: int | None = None
    host_bytes: int = 0
    resident_percent: float = 100.0

    @property
    def deeds(self) -> frozenset[str]:
        """What is done beside the format."""
        return deeds(self.options)

    def told(self) -> str:
        """All of it but the options."""
        at = f"{self.tokens:,} tokens" + f" x {self.batch} sequences" * (self.batch > 1)
        verb = "decodes" if self.kind == "decode" else "prefills"
        return (f"{verb} {self.value:,.{int(self.value < 10)}f} tokens/s at {at} ({self.model}, "
                f"{self.device}, commit {self.commit[:7]}, reports/{self.report})")


def deeds(options: tuple[str, ...]) -> frozenset[str]:
    """Of the words those beside the format that change a speed; a policy over shared prefixes does
    not, for it lets ended requests go only."""
    keys = {"offload", "retrieval", "window"} | (set() if "prefix=hash" in options else {"policy"})
    return frozenset(o for o in options if o.partition("=")[0] in keys)


@cache
def speeds(path: Path = SPEEDS) -> tuple[Speed, ...]:
    """All rows, in the order of the file."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return tuple(Speed(**row | {"options": tuple(row["options"])}) for row in rows)


def nearest_speed(
    options: tuple[str, ...], kind: str, tokens: int, requests: int, device: str | None
) -> Speed | None:
    """The row of the same deeds, of this device if it is named, whose format, batch and length in
    this order come nearest. Lengths are compared by their ratio."""
    wanted = deeds(options)
    format = next(o for o in options if o.startswith("format="))
    same = [s for s in speeds() if s.kind == kind and device in (None, s.device)
            and (s.deeds == wanted or wanted and wanted < s.deeds)]
    same = [s for s in same if format in s.options] or ([] if not wanted else same)
    return min(same, key=lambda s: (abs(math.log(s.batch / requests)),
                                    abs(math.log(s.tokens / tokens))), default=None)  # fmt: skip


@cache
def evictions() -> tuple[Loss, ...]:
    """What eviction was measured to lose, with summaries too; rows as those of formats."""
    return losses(EVICTIONS)


def partial(words: tuple[str, ...]) -> list[Loss]:
    """What reading a part of the past lost, in 16 bits: the rows whose options are a format in 16
    bits and these words, one for each model; [] where nobody measured it. Of a choice of blocks the
    figures are those of decoded tokens, for no others choose."""
    return [row for row in losses(PARTIAL) if row.options == ("format=bf16", *words)]


def long_enough(params: dict) -> bool:
    """Whether a row of a window or a choice of blocks was measured on text of twice the tokens that
    it reads, or more: on less it lost next to nothing because it read nearly all."""
    read = params.get("retrieval.budget_tokens") or params.get("window.recent", 0)
    return params["tokens"] >= 2 * read


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
