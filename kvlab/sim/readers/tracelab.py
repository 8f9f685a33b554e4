"""TraceLab: rounds of coding agents; ids follow from how much of each prompt the server had.

`input_tokens_total` = `prefix_tokens` + `newly_append_tokens`. A round keeps the whole blocks that
lie in its `prefix_tokens` from the round before it in its session; all others are new. So what a
server had forgotten counts as new text, and what sessions share is not seen: the ideal hit rate is
at most the real one. Rounds go by time: `round_index` is not always in its order.
https://github.com/uw-syfi/TraceLab (data CC-BY-4.0)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from kvlab.core import BadInput
from kvlab.sim.readers.base import Numbers, Reader, Row, check_lengths, in_order
from kvlab.sim.readers.lines import milliseconds

_LENGTHS = ("input_tokens_total", "prefix_tokens", "newly_append_tokens", "output_tokens")
_ASKS = ("user_message", "tool_result")


class TraceLab(Reader):
    name = "tracelab"
    needs = ("session_id", "timing_events", *_LENGTHS[:3])
    default_block = 64
    whole_blocks = True

    def rows(self) -> Iterator[tuple[str, Row]]:
        fresh, before, numbers = count(), {}, Numbers()
        first: float | None = None
        for where, timed in in_order(self._timed()):
            first = timed.arrival_ms if first is None else first
            session, prefix = timed.session, timed.cached_tokens
            held = before.get(session, [])
            if prefix // self.block_size > len(held):
                self.note("prefixes longer than the round before (shared by sessions) count as new")
            kept = held[: min(prefix, timed.input_tokens) // self.block_size]
            new = timed.input_tokens // self.block_size - len(kept)
            before[session] = ids = [*kept, *(next(fresh) for _ in range(new))]
            at = timed.arrival_ms - first
            yield where, timed._replace(arrival_ms=at, ids=ids, session=numbers[session])

    def _timed(self) -> Iterator[tuple[str, Row]]:
        """Rounds without ids, each at the moment when it was asked."""
        self.note("ids are made of prefix_tokens: what the server had lost counts as new text")
        for where, row in self.records():
            lengths = [row.get(name) or 0 for name in _LENGTHS]
            check_lengths(where, **dict(zip(_LENGTHS, lengths)))
            total, prefix, new, output = lengths
            if total != prefix + new:
                remedy = f"input_tokens_total {total} is not prefix {prefix} + newly appended {new}"
                raise BadInput("trace.path", where, remedy)
            at = self._asked(where, row)
            if at is None or not total:
                self.note("rounds without a time or without input are left out")
                continue
            yield where, Row(at, total, output, [], row["session_id"], cached_tokens=prefix)

    def _asked(self, where: str, row: dict) -> float | None:
        """When the last input was there, else the first output; ms, None where nothing is known."""
        times: dict[bool, list[float]] = {True: [], False: []}
        for event in row["timing_events"] or []:
            if event.get("timestamp"):
                at = milliseconds(where, "timestamp", event["timestamp"])
                times[event.get("event_type") in _ASKS].append(at)
        return max(times[True]) if times[True] else min(times[False], default=None)
