"""Request traces: what was asked, in which order, and which blocks each request names.

Ids are chained over the prefix: equal ids mean the same block after the same prefix. `readers/` has
the file formats, `definitions.py` what counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from kvlab.core import BadInput

MOONCAKE_BLOCK = 512


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests as flat arrays: R requests, A block accesses.

    arrival_ms float64 [R]; input_tokens, output_tokens int64 [R]; first int64 [R + 1] is where each
    request's blocks begin in `ids` int64 [A]; block_size in tokens.
    whole_blocks: only whole blocks have ids, the rest of a prompt has none; else the last id may
    be of a partial block. shares: False where ids say nothing of equal prefixes (lengths only).
    columns: what else is known of each request, arrays [R]: `session` int64; `think_ms` float64,
    the pause before it; `cached_tokens`, `tool`, `shared_tokens`, `scope`, `root` int64
    as in `readers.base.Row`, -1 unknown; and what `Definitions` and `Sessions` add.
    format: the reader's name. notes: sentences on what the reader assumed.
    """

    name: str
    block_size: int
    arrival_ms: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    first: np.ndarray
    ids: np.ndarray
    whole_blocks: bool = False
    shares: bool = True
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    format: str = "made"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_tokens)

    @property
    def accesses(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return int(self.input_tokens.sum())

    def pieces(self) -> Iterator[Trace]:
        """A loaded trace is one piece; a `TraceStream` yields many. `simulate` takes both."""
        yield self

    def requests(self) -> Iterator[list[int]]:
        """The block ids of each request as plain integers."""
        ids, first = self.ids.tolist(), self.first.tolist()
        for begin, end in zip(first, first[1:]):
            yield ids[begin:end]

    @cached_property
    def dense(self) -> tuple[np.ndarray, int]:
        """Ids renumbered into 0..U-1 (int64 [A]) and U; bundled traces are that already."""
        if not self.accesses:
            return self.ids, 0
        low, high = int(self.ids.min()), int(self.ids.max())
        if low >= 0 and high < 2 * self.accesses:  # dense enough: a table indexed by id is small
            return self.ids, high + 1
        unique, inverse = np.unique(self.ids, return_inverse=True)
        return inverse.astype(np.int64), len(unique)

    @cached_property
    def request_of(self) -> np.ndarray:
        """Request index of each access, int64 [A]."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    @cached_property
    def depth(self) -> np.ndarray:
        """Position of each access in its request, int64 [A]."""
        return np.arange(self.accesses) - np.repeat(self.first[:-1], np.diff(self.first))

    @cached_property
    def partial(self) -> np.ndarray:
        """Whether the last block of each request is partial, bool [R]."""
        return (self.input_tokens % self.block_size > 0) & (not self.whole_blocks)

    @cached_property
    def counted(self) -> np.ndarray | None:
        """Mask [A] of the accesses that rates are made of; None: all (see `Definitions`)."""
        counted, prompt = self.columns.get("counted"), self.columns.get("prompt_blocks")
        if counted is None and prompt is None:
            return None
        mask = np.ones(self.accesses, dtype=bool) if counted is None else counted[self.request_of]
        if (skipped := self.columns.get("skipped_blocks")) is not None:
            mask &= self.depth >= skipped[self.request_of]
        return mask if prompt is None else mask & (self.depth < prompt[self.request_of])

    @cached_property
    def counted_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt tokens that rates are of, as (ends, minus begins), int64 each, of the requests
        that count: a skipped head is left out."""
        counted = self.columns.get("counted", np.ones(len(self), dtype=bool))
        ends = self.input_tokens[counted]
        heads = self.columns.get("skipped_blocks", np.zeros(len(self), dtype=np.int64))[counted]
        return ends, -np.minimum(heads * self.block_size, ends)

    @cached_property
    def block_tokens(self) -> np.ndarray:
        """Tokens that each access stands for, int64 [A]: the block size, less for a partial end."""
        left = self.input_tokens[self.request_of] - self.depth * self.block_size
        return np.minimum(left, self.block_size)

    @cached_property
    def previous(self) -> np.ndarray:
        """Index of the access before to the same block, -1 for its first; int64 [A]."""
        ids, _ = self.dense
        order = np.argsort(ids, kind="stable")
        again = ids[order[1:]] == ids[order[:-1]]
        result = np.full(self.accesses, -1)
        result[order[1:][again]] = order[:-1][again]
        return result

    def check_prefix_chained(self) -> None:
        """Raise `BadInput` unless every id always follows the same id at the same depth."""
        self.check_shares()
        ids, count = self.dense
        parent = np.where(self.depth > 0, np.roll(ids, 1), -1)
        known = np.full(count, -2)
        known[ids] = parent
        wrong = np.flatnonzero(known[ids] != parent)
        if len(wrong):
            raise BadInput(
                "trace",
                self.name,
                f"block id {int(self.ids[wrong[0]])} follows different blocks in different "
                "requests; ids must be chained over the whole prefix for this question",
            )

    def check_shares(self) -> None:
        """Raise `BadInput` where the trace has no block ids, only lengths and arrivals."""
        if not self.shares:
            raise BadInput(
                "trace",
                self.name,
                f"{self.format} traces hold lengths and arrivals, no prefixes: they can drive a "
                "load, but hit rates need a trace with block ids or sessions of text",
            )

    def select(self, keep: np.ndarray) -> Trace:
        """The requests of a mask [R], or of indices in this order, with their blocks."""
        length = np.diff(self.first)[keep]
        starts = np.repeat(self.first[:-1][keep], length)
        first = np.concatenate([[0], np.cumsum(length)])
        within = np.arange(first[-1]) - np.repeat(first[:-1], length)
        return replace(
            self,
            arrival_ms=self.arrival_ms[keep],
            input_tokens=self.input_tokens[keep],
            output_tokens=self.output_tokens[keep],
            first=first,
            ids=self.ids[starts + within],
            columns={name: column[keep] for name, column in self.columns.items()},
        )

    def coarser(self, multiple: int) -> Trace:
        """The same requests in blocks `multiple` times as large, exactly.

        A chained id names its whole prefix, so a group of blocks is named by its last id; ids are
        then renumbered by first appearance. Where only whole blocks have ids, so it stays.
        """
        if multiple < 1:
            raise BadInput("multiple", multiple, "must be a whole number of at least 1")
        self.check_prefix_chained()
        length = np.diff(self.first)
        ends = (self.depth + 1 == length[self.request_of]) & (not self.whole_blocks)
        kept = ends | ((self.depth + 1) % multiple == 0)
        groups = length // multiple if self.whole_blocks else -(-length // multiple)
        first = np.concatenate([[0], np.cumsum(groups)])
        return replace(
            self, block_size=self.block_size * multiple, first=first, ids=_renumber(self.ids[kept])
        )

    def with_block_size(self, tokens: int) -> Trace:
        """This trace in blocks of `tokens` tokens; finer than its own is refused."""
        if tokens == self.block_size:
            return self
        if tokens < self.block_size or tokens % self.block_size:
            raise BadInput(
                "trace.block_size",
                tokens,
                f"trace {self.name} has blocks of {self.block_size} tokens; only multiples of that "
                "can be derived, because an id says nothing about the tokens inside its block",
            )
        return self.coarser(tokens // self.block_size)


def _renumber(ids: np.ndarray) -> np.ndarray:
    """Ids replaced by 0, 1, 2, ... in order of first appearance."""
    _, at, inverse = np.unique(ids, return_index=True, return_inverse=True)
    rank = np.empty(len(at), dtype=np.int64)
    rank[np.argsort(at)] = np.arange(len(at))
    return rank[inverse]


def from_requests(
    requests: Iterable[tuple[float, int, int, list[int]]], block_size: int, name: str = "trace"
) -> Trace:
    """A trace of (arrival_ms, input_tokens, output_tokens, block ids) tuples."""
    rows = list(requests)
    ids = [np.asarray(row[3], dtype=np.int64) for row in rows]
    column = [np.array([row[i] for row in rows], dtype=t) for i, t in enumerate("dqq")]
    first = np.concatenate([[0], np.cumsum([len(row) for row in ids], dtype=np.int64)])
    flat = np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)
    return Trace(name, block_size, *column, first.astype(np.int64), flat)
