"""Tasks whose items are drawn from a seed and fitted to a length in the model's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from os.path import commonprefix
from random import Random

import numpy as np

from kvlab import stats
from kvlab.core import BadInput, Measurement
from kvlab.eval import rows, scorers
from kvlab.eval.asking import Asking
from kvlab.eval.runner import Runner
from kvlab.eval.task import Item, Question
from kvlab.eval.tasks.kept import Kept
from kvlab.eval.tasks.protocol import Protocol
from kvlab.eval.tasks.wording import Prompt, Wording
from kvlab.model import LoadedModel

FOUND = 4  # characters of an answer that nobody writes by chance


class Drawn(Asking):
    """A member says `prompt(units, rng)`, a prompt with so many units of haystack; this class
    finds the most units that fit, draws the items and scores the answers.

    name, generates: the task and how many tokens its authors generate. right: its scorer. exactly:
    whether there is one right answer, which the first line may be. copies: whether it is a string
    to be copied, so that one found but miscopied is told apart. turns: whether questions come one
    behind the other.
    step, least: by how many units a prompt that is too long shrinks, and the fewest it may have.
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
    step = 1
    least = 1
    settings: tuple[str, ...] = ()

    def __init__(self, protocol: Protocol | None = None):
        protocol = protocol or Protocol()
        super().__init__(
            protocol.question_tokens, protocol.query_aware, protocol.new_tokens or self.generates,
            self.right, protocol.decode_driver,
        )
        self.protocol, self.seed = protocol, 0
        self.length = self.sizes()[0]

    # -- what a member says

    def prompt(self, units: int, rng: Random) -> Prompt:
        raise NotImplementedError

    def most(self) -> int:
        """Units that a prompt can have at most, however long it may be."""
        return 1 << 24

    def sizes(self) -> list[int]:
        """The lengths of its parts."""
        return self.protocol.lengths

    def read_from(self) -> str:
        """A word for the content of files that items come from, beside what `settings` say."""
        return ""

    # -- parts and record

    def parts(self, model: LoadedModel) -> list[Drawn]:
        found = []
        for length in self.sizes():
            found.append(copy(self))
            found[-1].length = length
            found[-1].chat = Wording(model.tokenizer, self.protocol.chat).chat
        return found

    def params(self) -> dict:
        own = {name: getattr(self, name) for name in self.settings}
        return super().params() | self.measured() | own | {
            "samples": self.protocol.samples,
            "chat": getattr(self, "chat", self.protocol.chat),
        }

    def measured(self) -> dict:
        return {"tokens": self.length}

    def beside(self, full: Runner) -> list[Runner]:
        if not self.protocol.no_context:
            return []
        told = "the question alone: what is right then is guessed"
        params = full.params | {"baseline": False, "control": told}
        return [replace(full, name="no context", params=params, reads=False, raws={}, stats=[])]

    # -- items

    def items(self, model: LoadedModel, data, seed: int) -> list[Item]:
        return Kept(self, model.tokenizer, seed).items(lambda: list(self.drawn(model, seed)))

    def drawn(self, model: LoadedModel, seed: int) -> Iterator[Item]:
        self.seed = seed
        wording = Wording(model.tokenizer, self.protocol.chat)
        units = self.fitting(wording)
        for number in range(self.protocol.samples):
            name = f"{self.name}, item {number + 1}"
            yield self.fitted(wording, name, units, number)

    def dice(self, *words) -> Random:
        """For an item, or for a throw-away sample; seeded by text, so the same everywhere."""
        return Random(" ".join(map(str, (self.seed, self.name, self.length, *words))))

    def fitted(self, wording: Wording, name: str, units: int, number: int) -> Item:
        """The item at so many units, or fewer, until it fits; raises `BadInput` where none does."""
        while units >= self.least:
            prompt = self.prompt(units, self.dice("item", number))
            item = wording.item(name, prompt, self.turns)
            if self.fits(item, wording):
                return item
            units -= self.step
        raise BadInput("eval.lengths", self.length, f"{self.name} needs more tokens than that: "
                       "question, answer and the least of a haystack do not fit")

    def fitting(self, wording: Wording) -> int:
        """The most units that fit, each size tried with a sample that is thrown away."""
        def fits(units: int) -> bool:
            prompt = self.prompt(units, self.dice("size", units))
            return self.fits(wording.item("", prompt, self.turns), wording)

        low, high = self.least, self.least + 1
        while high < self.most() and fits(high):
            low, high = high, min(2 * high, self.most())
        if high == self.most() and fits(high):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def fits(self, item: Item, wording: Wording) -> bool:
        """Whether the prompt and what is generated behind it have at most `length` tokens."""
        asked = [len(question.ids) + self.new_tokens for question in item.questions]
        behind = sum(asked) if self.turns else max(asked)
        return len(item.context) + behind <= self.length

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
        for name, column in (("task_answer_tokens", said), ("task_answer_longer_tokens", gaps)):
            found = stats.mean_interval([np.concatenate(column)], block=1, seed=seed)
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
