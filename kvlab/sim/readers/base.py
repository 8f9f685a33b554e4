"""What a reader of one trace format is, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from math import nan
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from kvlab.core import BadInput
from kvlab.sim.readers.lines import lines, parse

LONGEST = 1 << 26  # tokens; a longer prompt is a mistake of the file


class Row(NamedTuple):
    """One request: arrival and pause in ms, lengths in tokens, chained block ids of the input.

    session: number of the conversation, -1 where the format has none. cached_tokens: what the
    server that was traced said hit. tool: 1 where the answer ends by calling a tool, else 0.
    shared_tokens: of tools and system prompt at its head. scope: number of what it may share with
    (its model). root: the session that began this one, a sub-agent's. In each -1: not said.
    """

    arrival_ms: float
    input_tokens: int
    output_tokens: int
    ids: Sequence[int] | np.ndarray
    session: int = -1
    think_ms: float = nan
    cached_tokens: int = -1
    tool: int = -1
    shared_tokens: int = -1
    scope: int = -1
    root: int = -1


class Head(NamedTuple):
    """What is seen of a file before it is read. kind: folder, parquet, csv or json; `fields` of its
    first record."""

    path: Path
    kind: str
    fields: frozenset[str]


class Reader:
    """One file (or folder) in one format; `rows` may be called again and starts anew.

    Subclasses set `name`, `needs` (fields by which a record is known) and `rows`, and append to
    `notes` what they assumed. Raises `BadInput` with the place of what cannot be used.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    never: ClassVar[frozenset[str]] = frozenset()  # fields that only another format has
    kinds: ClassVar[tuple[str, ...]] = ("json",)
    default_block: ClassVar[int] = 512
    whole_blocks: bool = False
    shares: ClassVar[bool] = True
    tokenizes: ClassVar[bool] = False
    known: ClassVar[list[type[Reader]]] = []

    def __init_subclass__(cls, **more):
        super().__init_subclass__(**more)
        cls._fields = frozenset(cls.needs)
        if "name" in vars(cls):
            Reader.known.append(cls)

    def __init__(self, path: Path, block_size: int | None = None, tokenizer: str | None = None):
        self.path, self.tokenizer, self.notes = path, tokenizer, []
        if tokenizer is not None and not self.tokenizes:
            remedy = f"{self.name} traces hold no text to tokenize; leave it null"
            raise BadInput("trace.tokenizer", tokenizer, remedy)
        self.block_size = self._size(block_size)

    @classmethod
    def claims(cls, head: Head) -> bool:
        known = head.fields.issuperset(cls.needs) and not cls.never & head.fields
        return head.kind in cls.kinds and known

    def rows(self) -> Iterator[tuple[str, Row]]:
        """(place, request) of each request, in order of arrival."""
        raise NotImplementedError

    def said_block_size(self) -> int | None:
        """The tokens of a block where the file says it."""
        return None

    def _size(self, asked: int | None) -> int:
        said = self.said_block_size()
        if said is not None and asked is not None and said != asked:
            raise BadInput("trace.block_size", asked, f"the header of {self.path} says {said}")
        size = next(s for s in (said, asked, self.default_block) if s is not None)
        if type(size) is not int or size < 1:
            where = size if said is None else self.path
            raise BadInput("trace.block_size", where, "must be a whole number of at least 1")
        return size

    def records(self, skip: int = 0) -> Iterator[tuple[str, dict]]:
        """(place, object) of each line of JSON, after a check that it is of this format."""
        for at, (where, line) in enumerate(lines(self.path)):
            if at >= skip:
                row = parse(where, line)
                self.check_fields(where, row)
                yield where, row

    def check_fields(self, where: str, row: dict) -> None:
        if self._fields <= row.keys() and self.never.isdisjoint(row):
            return
        missing = [name for name in self.needs if name not in row]
        other = of_record(self.path, row)
        if other is not None and other is not type(self):
            remedy = (
                f"a line of {other.name} in a {self.name} trace; one format a file, and if all of "
                f"it is {other.name}, name it: trace.format={other.name}"
            )
            raise BadInput("trace.path", where, remedy)
        if missing:
            raise BadInput("trace.path", where, f"missing {', '.join(missing)}")

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def of_record(path: Path, row: dict) -> type[Reader] | None:
    """The reader whose format a record has."""
    head = Head(path, "json", frozenset(row))
    return next((reader for reader in Reader.known if reader.claims(head)), None)


def check_lengths(where: str, **lengths) -> None:
    """Refuse what is not a number of tokens, before anything is made of it."""
    for name, value in lengths.items():
        if type(value) is not int or not 0 <= value <= LONGEST:
            remedy = f"{name} must be a whole number of 0 to {LONGEST} tokens, not {value!r}"
            raise BadInput("trace.path", where, remedy)


class Numbers:
    """Names numbered 0, 1, 2, ... as they come."""

    def __init__(self):
        self._of: dict = {}

    def __getitem__(self, name) -> int:
        return self._of.setdefault(name, len(self._of))

    def __len__(self) -> int:
        return len(self._of)


def in_order(rows: Iterable[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """Requests sorted by arrival, those of one moment as they came."""
    order = count()
    keyed = sorted((row.arrival_ms, next(order), where, row) for where, row in rows)
    return [(where, row) for _, _, where, row in keyed]


LATEST = 2**53  # ms: behind it a double tells no millisecond from the next


def fault(row: Row, block_size: int, whole_blocks: bool) -> str | None:
    """What is wrong with the values of a request, as a sentence."""
    at, inputs, outputs = row[:3]
    if type(at) not in (int, float) or not 0 <= at < float("inf"):
        return f"timestamp must be milliseconds of at least 0, not {at!r}"
    if at >= LATEST:
        return f"timestamp must be milliseconds below 2**53, not {at!r}"
    if type(inputs) is not int or inputs < 1:
        return f"input_length must be a whole number of at least 1, not {inputs!r}"
    if type(outputs) is not int or outputs < 0:
        return f"output_length must be a whole number of at least 0, not {outputs!r}"
    if max(inputs, outputs) > LONGEST:
        return f"{max(inputs, outputs)} tokens in one request; at most {LONGEST} can be right"
    if type(row.think_ms) not in (int, float) or type(row.cached_tokens) is not int:
        return f"think_ms must be a number, not {row.think_ms!r}"
    return _fault_of_ids(row.ids, inputs, block_size, whole_blocks)


def _fault_of_ids(ids, inputs: int, block_size: int, whole_blocks: bool) -> str | None:
    listed = isinstance(ids, list) and not set(map(type, ids)) - {int}
    if not (listed or isinstance(ids, np.ndarray)):
        return "hash_ids must be a list of whole numbers"
    wanted = inputs // block_size if whole_blocks else -(-inputs // block_size)
    if len(ids) != wanted:
        return (
            f"{len(ids)} hash_ids, but {inputs} tokens in blocks of {block_size} are {wanted}"
            f"{' whole ones' * whole_blocks}; is the block size of the trace another one?"
        )
    made = isinstance(ids, np.ndarray)
    if not made and ids and not -(1 << 63) <= min(ids) <= max(ids) < 1 << 63:
        return "hash_ids must fit in 64 bits, signed"
    if made and (np.diff(ids) > 0).all():
        return None
    if len(np.unique(ids) if made else set(ids)) != len(ids):
        return "a hash_id comes twice in one request; a chained id names one place in a prompt"
    return None
