"""AXIS protocol: how the items of a task are asked; it stands in the record of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from kvlab.core import BadInput
from kvlab.model import Driver, check_driver

Chat = Literal["auto", "template", "plain"]


class Protocol:
    """What all tasks with generated items have in common.

    lengths: tokens of a prompt, the chat template and the tokens to be generated included.
    answer_tokens: of tasks whose answer is long instead: tokens of the right one, at most.
    samples: items for each length.
    query_aware: whether the question is inside the compressed text; else no policy has seen it.
    question_tokens: of question and answer prefix at a time, see `Asking`.
    new_tokens: of an answer at most; null is what the task's authors generate.
    chat: `template` is the model's own chat template, `plain` none of it; `auto` takes the template
        where there is one.
    no_context: also ask who has not read the context: what is scored then is guessing.
    decode_driver: of what comes one token at a time, see `Decoder`.
    """

    def __init__(
        self, lengths: Sequence[int] = (2048, 4096), answer_tokens: Sequence[int] = (256, 1024),
        samples: int = 20, query_aware: bool = False, question_tokens: int = 1,
        new_tokens: int | None = None, chat: Chat = "auto", no_context: bool = True,
        decode_driver: Driver = "auto",
    ):
        for name, values in (("lengths", lengths), ("answer_tokens", answer_tokens)):
            if not values or min(values) < 1:
                raise BadInput(f"eval.{name}", list(values), "give numbers of tokens, 1 or more")
        if samples < 1:
            raise BadInput("eval.samples", samples, "must be at least 1")
        if new_tokens is not None and new_tokens < 1:
            raise BadInput("eval.new_tokens", new_tokens, "must be at least 1, or null")
        check_driver(decode_driver)
        self.lengths, self.answer_tokens = sorted(lengths), sorted(answer_tokens)
        self.samples, self.query_aware = samples, query_aware
        self.question_tokens, self.new_tokens = question_tokens, new_tokens
        self.chat, self.no_context, self.decode_driver = chat, no_context, decode_driver

    def sizes(self, counted: str) -> list[int]:
        """The lengths of tasks that count them in `tokens` or in `answer_tokens`."""
        return {"tokens": self.lengths, "answer_tokens": self.answer_tokens}[counted]
