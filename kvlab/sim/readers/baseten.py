"""Baseten's completion traces: Parquet, with hashes and what the server itself had cached.

`timestamp_start_unix_ms`, `input_tokens`, `output_tokens`, `total_hashes` (one for each block of
`block_size` tokens), `provided_session_id` or `poor_man_session_id`, `cached_tokens_reference`.
Fields as NVIDIA AIPerf's loader defines them.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvlab.core import BadInput
from kvlab.sim.readers.base import Numbers, Reader, Row, in_order
from kvlab.sim.readers.text import parquet_rows

_NEEDED = ["timestamp_start_unix_ms", "input_tokens", "output_tokens", "total_hashes"]
_MORE = [
    "provided_session_id", "poor_man_session_id", "cached_tokens_reference", "model_name",
    "block_size", "request_canceled",
]  # fmt: skip


class Baseten(Reader):
    name = "baseten"
    needs = tuple(_NEEDED)
    kinds = ("parquet",)
    default_block = 16

    def said_block_size(self) -> int | None:
        sizes, ends = set(), set()
        for _, row in parquet_rows(self.path, ["block_size", "input_tokens", "total_hashes"]):
            size = row.get("block_size")
            sizes.add(size)
            if size and row["input_tokens"] % size:
                ends.add(len(row["total_hashes"] or ()) == row["input_tokens"] // size)
        if len(sizes) > 1:
            raise BadInput("trace.path", self.path, f"rows of several block sizes: {sizes}")
        self.whole_blocks = ends == {True}
        return next(iter(sizes), None)

    def rows(self) -> Iterator[tuple[str, Row]]:
        self.note("rows are taken in the order of their time, which counts from the first")
        found = in_order(self._rows())
        first = found[0][1].arrival_ms if found else 0
        return ((where, row._replace(arrival_ms=row.arrival_ms - first)) for where, row in found)

    def _rows(self) -> Iterator[tuple[str, Row]]:
        ids, sessions = Numbers(), Numbers()
        for where, row in parquet_rows(self.path, [*_NEEDED, *_MORE]):
            model, hashes = row.get("model_name"), row["total_hashes"]
            if not hashes and row["input_tokens"] >= self.block_size:
                remedy = "no total_hashes; the server's own tokenizer would be needed to make them"
                raise BadInput("trace.path", where, remedy)
            if row.get("request_canceled"):
                self.note("requests that were cancelled are kept")
            session = next((row[n] for n in _MORE[:2] if row.get(n) is not None), None)
            cached = row.get("cached_tokens_reference")
            yield where, Row(
                row["timestamp_start_unix_ms"], row["input_tokens"], row["output_tokens"],
                [ids[model, name] for name in hashes or ()],
                -1 if session is None else sessions[session],
                cached_tokens=-1 if cached is None else cached,
            )  # fmt: skip
