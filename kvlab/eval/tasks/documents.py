"""RULER's two question-answering tasks, from a local file of SQuAD or HotpotQA.

Definitions and wording are those of github.com/NVIDIA/RULER at c3f5e3b (Apache-2.0). Item n asks
question n; its documents lie among as many others as fit.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

from kvlab.core import BadInput
from kvlab.eval.tasks.drawn import Drawn
from kvlab.eval.tasks.kept import digest_of
from kvlab.eval.tasks.protocol import Protocol
from kvlab.eval.tasks.wording import Asked, Prompt


class Questioned(NamedTuple):
    """gold, near: numbers of the documents that hold the answer, and of those to take next."""

    query: str
    texts: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


class Documents(Drawn):
    """path: of the file; a member says how it is read and where it comes from."""

    generates = 32
    right = "contains_any"
    step = 10
    key = "task.path"
    source = ""
    BEFORE = ("Answer the question based on the given documents. Only give me the answer and do "
              "not output any other words.\n\nThe following are given documents.\n\n")  # fmt: skip
    QUESTION = ("Answer the question based on the given documents. Only give me the answer and do "
                "not output any other words.\n\nQuestion: {query}")  # fmt: skip

    def __init__(self, protocol: Protocol | None = None, path: str | None = None):
        super().__init__(protocol)
        self.path = path
        if path is None:
            raise BadInput(self.key, "null", f"{self.name} is made from {self.source}: give the "
                           f"path of a local copy, {self.key}=FILE")
        self.questions, self.documents = self.read(path)
        self.asked = 0

    def read(self, path: str) -> tuple[list[Questioned], list[str]]:
        raise NotImplementedError

    def read_from(self) -> str:
        return digest_of(self.path)

    def turn_to(self, number: int) -> None:
        if number >= len(self.questions):
            raise BadInput("eval.samples", self.protocol.samples,
                           f"{self.path} holds {len(self.questions)} questions that have an answer")
        self.asked = number
        self.least = len(self.questions[number].gold)

    def prompt(self, units: int, rng: Random) -> Prompt:
        one = self.questions[self.asked]
        told = [self.documents[n] for n in chosen(one, units, len(self.documents), rng)]
        Random(self.seed).shuffle(told)
        context = "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(told, 1))
        asked = Asked(self.QUESTION.format(query=one.query), " Answer:", one.texts)
        return Prompt(f"{self.BEFORE}{context}\n\n", (asked,), f"{self.BEFORE}\n\n")


def chosen(one: Questioned, units: int, count: int, rng: Random) -> list[int]:
    """Numbers of documents, of `count`: the right ones, then near ones, then any; all of them again
    where that is short."""
    room = units - len(one.gold)
    if units >= count:
        return [*range(count)] * (units // count) + [*range(units % count)]
    if room <= len(one.near):
        return [*one.gold, *rng.sample(one.near, max(0, room))]
    known = {*one.gold, *one.near}
    others = [n for n in range(count) if n not in known]
    return [*one.gold, *one.near, *rng.sample(others, room - len(one.near))]


class Squad(Documents):
    """A question on one paragraph; paragraphs of its article and others around it."""

    name = "qa_1"
    key = "eval.squad"
    source = "SQuAD 2.0's dev-v2.0.json"

    def read(self, path: str) -> tuple[list[Questioned], list[str]]:
        articles = [[(p["context"], p["qas"]) for p in article["paragraphs"]]
                    for article in opened(self.key, path, self.source, "data")]
        texts = sorted({text for article in articles for text, _ in article})
        at, found = {text: n for n, text in enumerate(texts)}, []
        for article in articles:
            mine = list(dict.fromkeys(at[text] for text, _ in article))
            for text, asked in article:
                near = tuple(n for n in mine if n != at[text])
                found += [Questioned(q["question"], tuple(a["text"] for a in q["answers"]),
                                     (at[text],), near)
                          for q in asked if not q["is_impossible"]]
        return found, texts


class Hotpot(Documents):
    """A question that needs two of its ten paragraphs; others around them."""

    name = "qa_2"
    key = "eval.hotpotqa"
    source = "HotpotQA's hotpot_dev_distractor_v1.json"

    def read(self, path: str) -> tuple[list[Questioned], list[str]]:
        rows = opened(self.key, path, self.source)
        told = [[f"{title}\n{''.join(lines)}" for title, lines in row["context"]] for row in rows]
        texts = sorted({text for row in told for text in row})
        at = {text: n for n, text in enumerate(texts)}
        return [Questioned(row["question"], (row["answer"],), tuple(at[text] for text in mine))
                for row, mine in zip(rows, told)], texts


@lru_cache
def opened(key: str, path: str, source: str, inside: str | None = None) -> list:
    try:
        content = json.loads(Path(path).expanduser().read_text("utf-8"))
        return content if inside is None else content[inside]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(key, path, f"is not {source}: {error!r}") from error
