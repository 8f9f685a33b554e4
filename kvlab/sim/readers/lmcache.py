"""LMCache's agentic traces: sessions of text, each call with all messages before it.

`session_id`, `input` (messages, cumulative), `output_length`, `pre_gap` (seconds before the call).
Lines of JSON, a Parquet file or a folder of them. Sessions have no start.
https://huggingface.co/datasets/sammshen/lmcache-agentic-traces (MIT)
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from kvlab.core import BadInput
from kvlab.sim.readers.base import Numbers, Row, in_order
from kvlab.sim.readers.text import TextReader, parquet_rows, rendered

_FIELDS = ["session_id", "input", "output_length", "pre_gap"]


class LMCache(TextReader):
    name = "lmcache"
    needs = tuple(_FIELDS[:3])
    kinds = ("json", "parquet")

    def rows(self) -> Iterator[tuple[str, Row]]:
        self.note("all sessions begin at 0 and calls follow after their pre_gap: answers are taken "
                  "to need no time")  # fmt: skip
        return iter(in_order(self._rows()))

    def _rows(self) -> Iterator[tuple[str, Row]]:
        tokens, blocks = self.start()
        numbers, now = Numbers(), {}
        for where, row in self._records():
            session = row["session_id"]
            parts = [tokens(text) for text in self._texts(where, row["input"])]
            gap = row.get("pre_gap") or 0
            if type(gap) not in (int, float) or gap < 0:
                raise BadInput("trace.path", where, f"pre_gap must be seconds, not {gap!r}")
            now[session] = now.get(session, 0.0) + 1e3 * gap
            ids = blocks.ids(session, parts)
            lengths = sum(map(len, parts)), row["output_length"]
            yield where, Row(now[session], *lengths, ids, numbers[session], 1e3 * gap)

    def _records(self) -> Iterator[tuple[str, dict]]:
        if self.path.is_dir() or self.path.suffix == ".parquet":
            return parquet_rows(self.path, _FIELDS)
        return self.records()

    def _texts(self, where: str, messages: object) -> Iterator[str]:
        if isinstance(messages, str):  # some copies hold the messages as text
            try:
                messages = json.loads(messages)
            except ValueError:
                pass
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise BadInput("trace.path", where, "input must be a list of messages")
        for message in messages:
            calls = message.get("tool_calls")
            yield rendered(message.get("role", ""), message.get("content"), calls)
