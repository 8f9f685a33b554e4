"""Dynamo's agentic form of Mooncake: requests that wait for other requests.

`request_id`, `session_id`, `hash_ids` of the whole prompt, `wait_for` (requests that must be
answered before), then `delay` and `tool_wait_ms`; without `wait_for` a `timestamp`, all in ms.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvlab.core import BadInput
from kvlab.sim.readers.base import Numbers, Reader, Row, in_order


class AgenticMooncake(Reader):
    name = "agentic-mooncake"
    needs = ("request_id", "output_length", "hash_ids")
    never = frozenset({"chat_id"})

    def rows(self) -> Iterator[tuple[str, Row]]:
        self.note("a request comes its delays after those that it waits for: answers are taken to "
                  "need no time")  # fmt: skip
        return iter(in_order(self._rows()))

    def _rows(self) -> Iterator[tuple[str, Row]]:
        requests: dict[object, tuple[str, dict]] = {}
        for where, row in self.records():
            if row["request_id"] in requests:
                remedy = f"request_id {row['request_id']!r} comes a second time"
                raise BadInput("trace.path", where, remedy)
            requests[row["request_id"]] = where, row
        arrival, sessions = self._arrivals(requests), Numbers()
        for name, (where, row) in requests.items():
            tokens = row.get("input_length", self.block_size * len(row["hash_ids"] or ()))
            session = sessions[row["session_id"]] if "session_id" in row else -1
            pause = self._pause(where, row) if row.get("wait_for") else float("nan")
            lengths = tokens, row["output_length"]
            yield where, Row(arrival[name], *lengths, row["hash_ids"], session, pause)

    def _arrivals(self, requests: dict) -> dict[object, float]:
        """Arrival of each request in ms; whom it waits for comes first."""
        arrival: dict[object, float] = {}
        for start in requests:
            line, inside = [start], {start}
            while line:
                where, row = requests[line[-1]]
                waits = row.get("wait_for") or []
                unknown = [name for name in waits if name not in requests]
                if unknown:
                    remedy = f"waits for {unknown[0]!r}, which is not in the file"
                    raise BadInput("trace.path", where, remedy)
                ahead = next((name for name in waits if name not in arrival), None)
                if ahead is None:
                    arrival[line[-1]] = self._arrival(where, row, [arrival[n] for n in waits])
                    inside.discard(line.pop())
                elif ahead in inside:
                    raise BadInput("trace.path", where, f"waits for {ahead!r}, which waits for it")
                else:
                    line.append(ahead)
                    inside.add(ahead)
        return arrival

    def _arrival(self, where: str, row: dict, ahead: list[float]) -> float:
        if ahead:
            return max(ahead) + self._pause(where, row)
        at = row.get("timestamp")
        if type(at) not in (int, float) or not at >= 0:
            remedy = f"a request that waits for none needs a timestamp in ms, not {at!r}"
            raise BadInput("trace.path", where, remedy)
        return float(at)

    def _pause(self, where: str, row: dict) -> float:
        pauses = [row.get(name) or 0 for name in ("delay", "tool_wait_ms")]
        if any(type(pause) not in (int, float) or pause < 0 for pause in pauses):
            raise BadInput("trace.path", where, "delay and tool_wait_ms must be ms of at least 0")
        return float(sum(pauses))
