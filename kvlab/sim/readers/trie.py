"""Applied Compute's TRIE form (Dynamo: applied_compute_agentic): a whole agent session a line.

`num_turns`, `input_prompt_length`, then for each turn `assistant_response_length`,
`tool_call_output_length` and `tool_call_latency` (seconds), and `final_assistant_response_length`.
A session is num_turns + 1 requests, each prompt holding all before it; sessions share nothing.
https://github.com/Applied-Compute/trie
"""

from __future__ import annotations

from collections.abc import Iterator

from kvlab.core import BadInput
from kvlab.sim.chain import Chain
from kvlab.sim.readers.base import Reader, Row, check_lengths, in_order

_ENDS = ("input_prompt_length", "final_assistant_response_length")
_TURNS = ("assistant_response_length", "tool_call_output_length", "tool_call_latency")


class AppliedCompute(Reader):
    name = "applied-compute"
    needs = ("num_turns", *_ENDS, *_TURNS)
    default_block = 64

    def rows(self) -> Iterator[tuple[str, Row]]:
        self.note("all sessions begin at 0 and requests follow after their tool: answers are taken "
                  "to need no time")  # fmt: skip
        self.note("sessions share nothing: the format says nothing of it")
        return iter(in_order(self._rows()))

    def _rows(self) -> Iterator[tuple[str, Row]]:
        table: dict[tuple, int] = {}
        for session, (where, row) in enumerate(self.records()):
            turns = list(zip(*self._turns(where, row)))
            chain, at, pause = Chain(table, self.block_size), 0.0, float("nan")
            chain.add((session, "prompt"), row["input_prompt_length"])
            for turn, (answer, result, latency) in enumerate(turns):
                yield where, Row(at, chain.tokens, answer, chain.ids(), session, pause, tool=1)
                chain.add((session, turn, "answer"), answer)
                chain.add((session, turn, "tool"), result)
                pause = 1e3 * latency
                at += pause
            last = row["final_assistant_response_length"]
            yield where, Row(at, chain.tokens, last, chain.ids(), session, pause, tool=0)

    def _turns(self, where: str, row: dict) -> list[list]:
        lists = [row[name] for name in _TURNS]
        numbers = all(
            isinstance(values, list) and all(type(v) in (int, float) and v >= 0 for v in values)
            for values in lists
        )
        if not numbers or {len(values) for values in lists} != {row["num_turns"]}:
            remedy = f"{', '.join(_TURNS)} must hold num_turns numbers of at least 0 each"
            raise BadInput("trace.path", where, remedy)
        for answer, result in zip(*lists[:2]):
            check_lengths(where, **dict(zip(_TURNS, (answer, result))))
        check_lengths(where, **{name: row[name] for name in _ENDS})
        return lists
