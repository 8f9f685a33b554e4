"""What a bench measures. A task has items, a run of one item through one cache, and rows.

    class Mine(Asking):
        name = "mine"

        def items(self, model, data, seed):
            yield Item("first", context, (Question(ids, texts=("blue",)),))

That is a whole task: `Asking` reads the context, asks, scores what is generated; this module pairs
the scores by item with those of the full cache and of negative controls. `TextLoss` is a task
whose runners go in step, `TimedTask` one that is measured for each cache alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from kvlab.core import BadInput, Measurement
from kvlab.eval import rows
from kvlab.eval.runner import Runner
from kvlab.model import LoadedModel

Raw = dict[str, np.ndarray]  # what a run of one item leaves; kept on disk under these names
NOTHING: Mapping = MappingProxyType({})
NO_TOKENS = np.zeros(0, dtype=np.int64)


class Question(NamedTuple):
    """One question behind a context, and what is right.

    ids: tokens [Q] that ask; the answer follows the last one. answer: tokens [A] to be fed and
    judged, where a task does so. texts: right answers, for a scorer of generated text; options:
    among which it chooses. tags: a cell of the report each, such as `depth_percent`.
    inside: of `ids`, how many belong to the compressed text where policies may see the question;
    the others are the assistant's header and how its answer begins. None: all but the last.
    """

    ids: np.ndarray
    answer: np.ndarray = NO_TOKENS
    texts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    tags: Mapping = NOTHING
    inside: int | None = None

    @property
    def seen(self) -> int:
        """Of `ids`, those that go inside the compressed text with `query_aware`."""
        return len(self.ids) - 1 if self.inside is None else self.inside


class Item(NamedTuple):
    """name: for messages. context: tokens [T] that go through the cache before any question.

    params: what the rows of a timed item say of it. blank: tokens in place of the context for who
    answers without having read it.
    """

    name: str
    context: np.ndarray
    questions: tuple[Question, ...] = ()
    params: Mapping = NOTHING
    blank: np.ndarray = NO_TOKENS

    def tokens(self) -> np.ndarray:
        """All of it in a row: what was measured on other tokens is not taken from disk."""
        asked = [part for q in self.questions for part in (q.ids, q.answer)]
        return np.concatenate([self.context, *asked])


class Task:
    """The base of tasks; itself the null member, which has nothing to measure.

    name: in params, and of rows (`NAME_percent`) unless `rows_as` is set, so that rows of like
    tasks make one column. quality: whether random weights mean nothing.
    lockstep: whether all caches go through an item side by side (`StepTask`). timed: whether each
    is measured for itself (`TimedTask`). score: the array of `run` that rows are made of, a number
    from 0 to 1 for each question. history: arrays whose means a tracker is told after each item.
    pairs_all: whether `versus` pairs with any other runner, whose turn may come late. accounts:
    whether rows of bytes are written beside its own.
    """

    name = "none"
    rows_as = ""
    quality = True
    lockstep = False
    timed = False
    score = "score"
    history: tuple[str, ...] = ()
    pairs_all = False
    accounts = True

    # -- what a task says

    def items(self, model: LoadedModel, data, seed: int) -> Iterable[Item]:
        """The same for every cache and every start: from the arguments alone."""
        raise NotImplementedError

    def run(self, runner: Runner, item: Item) -> Raw:
        """One item through one cache; arrays with one number for each question."""
        raise NotImplementedError

    def params(self) -> dict:
        """The settings that rows carry, and by which a resumed run knows them."""
        return {"task": self.name}

    def amounts(self, item: Item, chunk_tokens: int) -> dict[str, float]:
        """How much of each kind of work an item is, for the time left."""
        return {"read": len(item.context), "answer": len(item.questions)}

    @property
    def part(self) -> str:
        """What a part of the work is called: the task at one of its settings."""
        tokens = self.params().get("tokens")
        return f"{self.name} {tokens:,} tokens" if isinstance(tokens, int) else self.name

    def parts(self, model: LoadedModel) -> list[Task]:
        """The task at each of its settings, such as lengths; rows of each are apart. What a setting
        leaves to the device is decided here."""
        return [self]

    def beside(self, full: Runner) -> list[Runner]:
        """Runners besides the variants and their controls, such as a noise floor."""
        return []

    # -- what becomes of it; one column of scores unless a task says otherwise

    @property
    def of_rows(self) -> str:
        """How names of rows begin."""
        return self.rows_as or self.name

    @property
    def awaited(self) -> str:
        """The row that a runner has who is through all items."""
        return f"{self.of_rows}_percent"

    def rows(self, mine: Runner, full: Runner, seed: int) -> Iterator[Measurement]:
        """Over all items: the score, the full cache's, and the paired difference.

        Questions are what is resampled: each stands for itself.
        """
        own, theirs = mine.column(self.score), full.column(self.score)
        yield rows.share(f"{self.of_rows}_percent", own, seed)
        yield rows.share(f"{self.of_rows}_full_percent", theirs, seed)
        yield rows.points(f"{self.of_rows}_delta_points", own, theirs, seed)

    def against(self, mine: Runner, kind: str, other: Runner, seed: int) -> Iterable[Measurement]:
        """The difference to a negative control; kind: random, shuffled, window or chance."""
        own, theirs = mine.column(self.score), other.column(self.score)
        yield rows.points(f"{self.of_rows}_minus_{kind}_points", own, theirs, seed)

    def versus(self, mine: Runner, other: Runner, seed: int) -> Iterable[Measurement]:
        """Rows of `mine` paired with any other runner of the run, a variant say."""
        return ()

    def item_rows(self, mine: Runner, number: int) -> Iterable[Measurement]:
        """Known at once of item `number`; without intervals, under names of their own."""
        return ()

    def details(self, folder, mine: Runner, full: Runner, items: list[Item], seed: int) -> None:
        """What a report draws: a row for each cell of tags."""
        cells: dict[tuple, list[np.ndarray]] = {}
        for item, scores in zip(items, mine.column(self.score)):
            for place, question in enumerate(item.questions):
                if question.tags:
                    key = tuple(question.tags.items())
                    cells.setdefault(key, []).append(scores[place : place + 1])
        for tags, found in cells.items():
            row = rows.share(f"{self.of_rows}_at_percent", found, seed)
            folder.add(mine.name, mine.params | dict(tags), [row])


class StepTask(Task):
    """A task that shows the full cache's logits to every other cache, step by step, so that
    nothing but one step's logits has to be held."""

    lockstep = True

    def check(self, items: Sequence[Item], chunk_tokens: int) -> None:
        """Raises `BadInput` where no item has a second step: what one step reads it has computed
        itself, so every cache would lose nothing."""
        if all(len(list(self.steps(item, chunk_tokens))) < 2 for item in items):
            raise BadInput("prefill.chunk_tokens", chunk_tokens, "reads each document in one chunk,"
                           " in which no token sees what a cache has made of those before; give "
                           "fewer, or eval.decode_tokens")

    def amounts(self, item: Item, chunk_tokens: int) -> dict[str, float]:
        found = {"read": 0.0, "decode": 0.0}
        for start, stop in self.steps(item, chunk_tokens):
            found[self.kind(item, (start, stop))] += stop - start
        return found

    def kind(self, item: Item, span: tuple[int, int]) -> str:
        """Of work: a chunk is read, a single token decoded."""
        return "decode" if span[1] - span[0] == 1 else "read"

    def steps(self, item: Item, chunk_tokens: int) -> Iterable[tuple[int, int]]:
        """From and to which token of the context each step goes."""
        raise NotImplementedError

    def step(self, runner: Runner, item: Item, span: tuple[int, int], full=None):
        """Logits of a step, and its scores (name -> [T], arrays, or tensors that stay on the device
        until the item ends), against `full`, the full cache's logits (None: this is the full
        cache)."""
        raise NotImplementedError


class TimedTask(Task):
    """A task measured for each cache alone, never for a control; nothing is paired."""

    quality = False
    timed = True

    def amounts(self, item: Item, chunk_tokens: int) -> dict[str, float]:
        return {"time": len(item.context)}

    def measure(self, runner: Runner, item: Item) -> Iterator[Measurement]:
        """Rows of one item, `awaited` among them."""
        raise NotImplementedError
