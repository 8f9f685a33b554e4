"""Conversations of text as ShareGPT, WildChat and LMSYS-Chat have them: each answer is a request.

A JSON array or lines of JSON; the turns are under `conversations`, `conversation` or `messages`,
as `from`/`value` or `role`/`content`. No arrivals: requests come one after the other, conversation
by conversation.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from kvlab.core import BadInput
from kvlab.sim.readers.base import Row
from kvlab.sim.readers.lines import lines, whole_json
from kvlab.sim.readers.text import TextReader, Tokens, rendered

_TURNS = ("conversations", "conversation", "messages")
_ANSWERS = ("gpt", "assistant", "chatgpt", "model", "bing", "bard")


class ShareGPT(TextReader):
    name = "sharegpt"

    @classmethod
    def claims(cls, head) -> bool:
        return head.kind == "json" and bool(head.fields & set(_TURNS))

    def rows(self) -> Iterator[tuple[str, Row]]:
        self.note("no arrivals: requests come one after the other, conversation by conversation")
        tokens, blocks = self.start()
        number = count()
        for session, (where, record) in enumerate(self._conversations()):
            turns = next((record[name] for name in _TURNS if name in record), None)
            if not isinstance(turns, list):
                raise BadInput("trace.path", where, f"no turns under {', '.join(_TURNS)}")
            for prompt, answer in self._requests(where, turns, tokens):
                ids = blocks.ids(session, prompt)
                at = float(next(number))
                yield where, Row(at, sum(map(len, prompt)), len(answer), ids, session)

    def _requests(
        self, where: str, turns: list, tokens: Tokens
    ) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        said: list[np.ndarray] = []
        for turn in turns:
            role = isinstance(turn, dict) and turn.get("from", turn.get("role"))
            if not isinstance(role, str):
                remedy = "a turn needs from and value, or role and content"
                raise BadInput("trace.path", where, remedy)
            text = tokens(rendered(role, turn.get("value", turn.get("content"))))
            if role.lower() in _ANSWERS and said:
                yield list(said), text
            elif role.lower() in _ANSWERS:
                self.note("answers that nothing comes before are not requests")
            said.append(text)

    def _conversations(self) -> Iterator[tuple[str, dict]]:
        _, first = next(lines(self.path), ("", b""))
        if not first.lstrip().startswith(b"["):
            yield from self.records()
            return
        for at, record in enumerate(whole_json(self.path)):
            if not isinstance(record, dict):
                raise BadInput("trace.path", f"{self.path}, item {at}", "expected an object")
            yield f"{self.path}, item {at}", record
