"""A tokenizer of words for tests: `encode` and `decode` without a model, and a chat template."""

from __future__ import annotations

import re

PIECE = re.compile(r"\s|\w+|[^\w\s]")


class Spoken:
    """A token is a word, a mark or a space; ids in the order in which they were first seen."""

    chat_template = "yes"
    eos_token_id = None

    def __init__(self, chat: bool = True):
        self.known: dict[str, int] = {}
        if not chat:
            self.chat_template = None

    def __call__(self, text: str, **_) -> dict:
        pieces = PIECE.findall(text)
        return {"input_ids": [self.known.setdefault(p, len(self.known)) for p in pieces]}

    def decode(self, ids, **_) -> str:
        words = list(self.known)
        return "".join(words[int(i)] for i in ids)

    def get_vocab(self) -> dict[str, int]:
        return {}

    def apply_chat_template(self, turns, **_) -> str:
        told = "".join(f"<{turn['role']}>\n{turn['content']}</{turn['role']}>\n" for turn in turns)
        return f"<system>\nBe brief.</system>\n{told}<assistant>\n"


class Speaker:
    """What a task asks of a loaded model when it draws items."""

    def __init__(self, chat: bool = True):
        self.tokenizer = Spoken(chat)
