"""What traces of lengths and arrivals share: nothing is known of prefixes, no block is shared."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import ClassVar

from kvlab.sim.readers.base import Reader, Row, check_lengths, in_order
from kvlab.sim.readers.lines import table


class LengthsReader(Reader):
    """A CSV file; blocks get ids that no other request has, so that a load can be made of them."""

    kinds = ("csv",)
    default_block = 64
    shares: ClassVar[bool] = False

    def rows(self) -> Iterator[tuple[str, Row]]:
        self.note("lengths and arrivals only: fit to drive a load, no hit rate can come of it")
        fresh = count()
        first: float | None = None
        for where, row in in_order(self._rows()):
            first = row.arrival_ms if first is None else first
            ids = [next(fresh) for _ in range(-(-row.input_tokens // self.block_size))]
            yield where, row._replace(arrival_ms=row.arrival_ms - first, ids=ids)

    def _rows(self) -> Iterator[tuple[str, Row]]:
        for where, cells in table(self.path):
            row = self.row(where, cells)
            if row is not None:
                check_lengths(where, input=row.input_tokens, output=row.output_tokens)
                yield where, row

    def row(self, where: str, cells: dict[str, str]) -> Row | None:
        """The request of a line, None where it is none."""
        raise NotImplementedError
