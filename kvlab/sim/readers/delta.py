"""Mooncake's delta form (Dynamo): each line of a session holds only what its turn adds.

`hash_ids` and `input_length` are of the new tokens; the prompt is all before it in the session: the
earlier turns and what was answered. Later turns may have `delay` (ms after the answer) in place of
`timestamp`. Looks like Mooncake, so it has to be named.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvlab.core import BadInput
from kvlab.sim.chain import Chain
from kvlab.sim.readers.base import Numbers, Reader, Row, fault, in_order


class MooncakeDelta(Reader):
    name = "mooncake-delta"
    needs = ("session_id", "input_length", "output_length", "hash_ids")
    never = frozenset({"chat_id", "wait_for"})

    @classmethod
    def claims(cls, head) -> bool:
        return super().claims(head) and "timestamp" not in head.fields and "delay" in head.fields

    def rows(self) -> Iterator[tuple[str, Row]]:
        self.note("each prompt is the session's earlier turns, their answers, and the new tokens")
        return iter(in_order(self._rows()))

    def _rows(self) -> Iterator[tuple[str, Row]]:
        table: dict[tuple, int] = {}
        chains: dict[object, Chain] = {}
        last: dict[object, float] = {}
        numbers = Numbers()
        for where, row in self.records():
            session, answer = row["session_id"], row["output_length"]
            chain = chains.setdefault(session, Chain(table, self.block_size))
            pause, at = self._time(where, row, last.get(session))
            added = Row(at, row["input_length"], answer, row["hash_ids"])
            wrong = fault(added, self.block_size, False)
            if wrong:
                raise BadInput("trace.path", where, wrong)
            left = row["input_length"]
            for name in row["hash_ids"]:
                chain.add(name, min(left, self.block_size))
                left -= self.block_size
            yield where, Row(at, chain.tokens, answer, chain.ids(), numbers[session], pause)
            chain.add(("answer", session, chain.tokens), answer)
            last[session] = at

    def _time(self, where: str, row: dict, before: float | None) -> tuple[float, float]:
        """(pause, arrival) in ms."""
        pause = row.get("delay", row.get("delay_ms", float("nan")))
        if "timestamp" in row:
            return pause, row["timestamp"]
        if before is None:
            raise BadInput("trace.path", where, "the first turn of a session needs a timestamp")
        if type(pause) not in (int, float) or not pause >= 0:
            raise BadInput("trace.path", where, "a later turn needs a timestamp or a delay in ms")
        self.note("turns without a timestamp come their delay after the turn before: answers are "
                  "taken to need no time")  # fmt: skip
        return pause, before + pause
