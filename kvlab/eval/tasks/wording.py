"""A prompt in words and in tokens: what goes through the cache first, what asks, where it splits.

A prompt is cut in two where the question begins, and each part is tokenized for itself, as in
kvpress: the cache holds the tokens of the first part before it gets any of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from kvlab.core import BadInput
from kvlab.eval.needle import encode
from kvlab.eval.task import NOTHING, Item, Question
from kvlab.eval.tasks.protocol import Chat

# Stand in a template where texts will: words of a private alphabet, which no template trims.
_HERE = ("\u2063a\u2063", "\u2063b\u2063", "\u2063c\u2063")


class Asked(NamedTuple):
    """question: the rest of the user's turn. prefix: how the answer begins. texts: right ones."""

    question: str
    prefix: str
    texts: tuple[str, ...]
    tags: Mapping = NOTHING


class Prompt(NamedTuple):
    """context: the user's turn up to the question. blank: the same with nothing to be read."""

    context: str
    asked: tuple[Asked, ...]
    blank: str


class Wording:
    """A model's own words around a prompt: its chat template, or none.

    head: before the user's text. tail: behind it, up to where the answer begins. between: from
    an answer to the next question. Raises `BadInput` for a template that is wanted and not there.
    """

    def __init__(self, tokenizer: Callable, chat: Chat = "auto"):
        self.tokenizer = tokenizer
        there = bool(getattr(tokenizer, "chat_template", None))
        if chat == "template" and not there:
            raise BadInput("eval.chat", chat, "the model's tokenizer has no chat template; plain")
        self.chat = "template" if there and chat != "plain" else "plain"
        self.begin = [] if self.chat == "template" else list(tokenizer("")["input_ids"])
        self.head, self.tail, self.between = "", "", "\n\n"
        if self.chat == "template":
            self._read_template()

    def _read_template(self) -> None:
        one, two, three = _HERE
        self.head, _, self.tail = self._rendered([("user", one)]).partition(one)
        turns = self._rendered([("user", one), ("assistant", two), ("user", three)])
        self.between = turns.partition(two)[2].partition(three)[0]

    def _rendered(self, turns: list[tuple[str, str]]) -> str:
        """Templates that know `enable_thinking` are asked not to."""
        return self.tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns], tokenize=False,
            add_generation_prompt=True, enable_thinking=False,
        )

    def item(self, name: str, prompt: Prompt, turns: bool = False) -> Item:
        """In tokens. turns: whether the questions come one behind the other."""
        def context(text: str) -> np.ndarray:
            return np.array([*self.begin, *encode(self.tokenizer, self.head + text)])

        questions = tuple(
            self._question(asked, self.between if turns and number else "")
            for number, asked in enumerate(prompt.asked)
        )
        return Item(name, context(prompt.context), questions, blank=context(prompt.blank))

    def _question(self, asked: Asked, before: str) -> Question:
        inside = encode(self.tokenizer, before + asked.question)
        behind = encode(self.tokenizer, self.tail + asked.prefix)
        if not behind:  # something has to ask
            inside, behind = inside[:-1], inside[-1:]
        return Question(np.array([*inside, *behind]), texts=asked.texts, tags=asked.tags,
                        inside=len(inside))
