"""Mooncake (FAST'25): one request a line, prefix-chained ids of 512-token blocks.

`timestamp` (ms), `input_length`, `output_length` (tokens), `hash_ids`, one for each begun block:
the last may be partial. A first line `{"block_size": 16}` is kvlab's own: the tokens of a block,
and with `"whole_blocks": true` that a partial block has no id. A `session_id` is kept.
https://github.com/kvcache-ai/Mooncake, FAST25-release
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import nan

from kvlab.sim.readers.base import Numbers, Reader, Row
from kvlab.sim.readers.lines import lines

FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


class Mooncake(Reader):
    name = "mooncake"
    needs = FIELDS
    never = frozenset({"chat_id", "wait_for", "request_id"})

    @classmethod
    def claims(cls, head) -> bool:
        return super().claims(head) or (head.kind == "json" and is_header(head.fields))

    def said_block_size(self) -> int | None:
        header = self._header()
        self._skip = int(header is not None)
        self.whole_blocks = bool(header and header.get("whole_blocks"))
        return header["block_size"] if header else None

    def _header(self) -> dict | None:
        _, line = next(lines(self.path), ("", b""))
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # reported with its line when that is read
            return None
        return row if isinstance(row, dict) and is_header(row.keys()) else None

    def rows(self) -> Iterator[tuple[str, Row]]:
        sessions = Numbers()
        for where, row in self.records(self._skip):
            values = [row[name] for name in FIELDS]
            session = sessions[row["session_id"]] if "session_id" in row else -1
            yield where, Row(*values, session, row.get("think_ms", nan))


def is_header(fields) -> bool:
    return "block_size" in fields and fields <= {"block_size", "whole_blocks"}
