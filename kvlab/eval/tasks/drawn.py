"""Tasks whose items are drawn from a seed and fitted to a length in the model's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from os.path import commonprefix
from random import Random

import numpy as np

from kvlab import stats
from kvlab.core import Measurement
from kvlab.eval import rows, scorers
from kvlab.eval.asking import Asking
from kvlab.eval.runner import Runner
from kvlab.eval.task import Item, Question
from kvlab.eval.tasks import fitting
from kvlab.eval.tasks.kept import Kept
from kvlab.eval.tasks.protocol import Protocol
from kvlab.eval.tasks.wording import Prompt, Wording
from kvlab.model import LoadedModel

FOUND = 4  # characters of an answer that nobody writes by chance


class Drawn(Asking):
    """A member says `prompt(units, rng)`, a prompt with so many units of haystack; `fitting` finds
    the most units that fit and draws the items, this class scores the answers.

    name, generates: the task and how many tokens its authors generate. right: its scorer. exactly:
    whether there is one right answer, which the first line may be. copies: whether it is a string
    to be copied, so that one found but miscopied is told apart. turns: whether questions come one
    behind the other.
    counted: what its length is, of the prompt (tokens) or of the right answer (answer_tokens).
    step, least: by how many units a prompt that is too long shrinks, and the fewest it may have.
    most: units that it can have, however long it may be.
    settings: names of the arguments of a member's own, for the record.

    Everything is drawn with `random.Random` seeded by text, so items are the same everywhere and
    item n is the same however many there are.
    """

    rows_as = "task_score"
    stop = ()
    generates = 32
    right = "contains_all"
    copies = False
    exactly = True
    turns = False
    counted = "tokens"
    step = 1
    least = 1
    most = 1 << 24
    settings: tuple[str, ...] = ()

    def __init__(self, protocol: Protocol | None = None):
        protocol = protocol or Protocol()
        super().__init__(
            protocol.question_tokens, protocol.query_aware, protocol.new_tokens or self.generates,
            self.right, protocol.decode_driver,
        )
        self.protocol, self.seed = protocol, 0
        self.fit_to(protocol.sizes(self.counted)[0])

    # -- what a member says

    def prompt(self, units: int, rng: Random) -> Prompt:
        raise NotImplementedError

    def fit_to(self, length: int) -> None:
        """Take this length, and what follows from it."""
        self.length = length

    def units(self, wording: Wording) -> int:
        """The most units that fit."""
        return fitting.largest(self, wording)

    def turn_to(self, number: int) -> None:
        """The item of this number is about to be drawn."""

    def read_from(self) -> str:
        """A word for the content of files that items come from, beside what `settings` say."""
        return ""

    # -- parts, record and items

    def parts(self, model: LoadedModel) -> list[Drawn]:
        found = []
        for length in self.protocol.sizes(self.counted):
            found.append(copy(self))
            found[-1].fit_to(length)
            found[-1].chat = Wording(model.tokenizer, self.protocol.chat).chat
        return found

    def params(self) -> dict:
        own = {name: getattr(self, name) for name in self.settings}
        return super().params() | {self.counted: self.length} | own | {
            "samples": self.protocol.samples,
            "chat": getattr(self, "chat", self.protocol.chat),
        }

    def beside(self, full: Runner) -> list[Runner]:
        if not self.protocol.no_context:
            return []
        told = "the question alone: what is right then is guessed"
        params = full.params | {"baseline": False, "control": told}
        return [replace(full, name="no context", params=params, reads=False, raws={}, stats=[])]

    def items(self, model: LoadedModel, data, seed: int) -> list[Item]:
        kept = Kept(self, model.tokenizer, seed)
        return kept.items(lambda: list(fitting.drawn(self, model.tokenizer, seed)))

    # -- scores

    def marks(self, text: str, question: Question) -> dict[str, float]:
        found = super().marks(plain(text), question)
        if self.exactly:
            found["exact"] = scorers.exact(first_line(plain(text)), question)
        if self.copies:
            copied = [(longest_prefix(plain(text), right), right) for right in question.texts]
            found["copied"] = float(np.mean([n / len(right) for n, right in copied]))
            found["miscopied"] = float(any(
                recognised(right) <= n < len(right) for n, right in copied))  # fmt: skip
        return found

    def rows(self, mine: Runner, full: Runner, seed: int) -> Iterator[Measurement]:
        """Paired by item with the full cache: what an item's questions share, they share."""
        own, theirs = by_item(mine, "score"), by_item(full, "score")
        yield rows.share("task_score_percent", own, seed)
        yield rows.share("task_score_full_percent", theirs, seed)
        yield rows.points("task_score_delta_points", own, theirs, seed)
        for name in ("exact", "copied", "miscopied"):
            if found := by_item(mine, name):
                better = "lower" if name == "miscopied" else "higher"
                yield rows.share(f"task_{name}_percent", found, seed)._replace(better=better)
        said, theirs = (
            [lengths(x) for x in runner.column("answers")] for runner in (mine, full)
        )
        gaps = [a - b for a, b in zip(said, theirs)]
        counted = ("task_answer_tokens", said, 0.0), ("task_answer_longer_tokens", gaps, None)
        for name, column, least in counted:
            found = stats.mean_interval([np.concatenate(column)], block=1, seed=seed, least=least)
            yield rows.interval(name, found, "tokens", None, rows.size(column))

    def against(self, mine: Runner, kind: str, other: Runner, seed: int) -> Iterator[Measurement]:
        name = f"task_score_minus_{kind}_points"
        yield rows.points(name, by_item(mine, "score"), by_item(other, "score"), seed)


def by_item(runner: Runner, name: str) -> list[np.ndarray]:
    """The mean over each item's questions, [1] each."""
    return [np.mean(found, keepdims=True) for found in runner.column(name)]


def lengths(answers: np.ndarray) -> np.ndarray:
    """Tokens of each answer, of `answers` [questions, new_tokens]; -1 is behind the last."""
    return (answers >= 0).sum(-1)


def plain(text: str) -> str:
    """Control characters become line feeds, as RULER reads what a model wrote."""
    return "".join(c if ord(c) >= 32 else "\n" for c in text).strip()


def first_line(text: str) -> str:
    """Without what closes a sentence or quotes it."""
    return text.partition("\n")[0].strip(" .,;\"'`*")


def recognised(right: str) -> int:
    """Characters from the beginning of a right answer by which it was found, if not copied."""
    return max(min(FOUND, len(right) - 1), (len(right) + 1) // 2)


def longest_prefix(text: str, right: str) -> int:
    """Characters of the longest beginning of `right` that stands anywhere in the text."""
    found, at = 0, text.find(right[:1])
    while at >= 0 and found < len(right):
        found = max(found, len(commonprefix([text[at:], right])))
        at = text.find(right[: found + 1], at + 1)
    return found
