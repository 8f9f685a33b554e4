"""One task through all its runners: what is on disk is taken, the rest is measured, rows follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from kvlab.core import Measurement
from kvlab.eval.controls import companions
from kvlab.eval.rows import awaited_last, memory
from kvlab.eval.runner import Runner, alive, done, failing
from kvlab.eval.scores import Scores
from kvlab.eval.task import Item, Task
from kvlab.progress import Open


class Round:
    """`runners[0]` is the full cache that all others are paired with, item by item.

    A runner that raises is left out from there on, and its failure is a row; a full cache that does
    ends the run. Rows of a runner are written, in one batch and in the runners' order, as soon as
    it and those that it is paired with are through; so controls go right behind their variant.
    """

    def __init__(
        self, folder, task: Task, runners: list[Runner], items: list[Item], seed: int
    ):
        self.folder, self.task, self.items, self.seed = folder, task, items, seed
        self.scores, self.part = Scores(folder), task.part
        self.tokens = [item.tokens() for item in items]
        self.full = runners[0]
        self._written: set[int] = set()
        for runner in runners:
            for number, ids in enumerate(self.tokens):
                self.scores.take(runner, number, ids)
        self.runners = [
            r for r in runners
            if r is self.full or len(r.raws) == len(items) or not done(folder, r, task.awaited)
        ]
        if not task.lockstep:
            self.runners = with_companions(self.runners)

    def plan(self, work) -> None:
        """Tell a `Work` what is missing."""
        amounts = [self.amounts(item) for item in self.items]
        for runner, number in self._missing():
            work.plan(self.part, runner.name, amounts[number])

    def run(self, bar: Open) -> None:
        """Measure what is missing and write all rows; `bar` has heard the plan."""
        self.bar = bar
        if self.task.lockstep:
            self._in_step()
        else:
            self._one_by_one()
        self._write(self.runners)

    def amounts(self, item: Item) -> dict[str, float]:
        return self.task.amounts(item, self.full.chunk_tokens)

    def _missing(self) -> list[tuple[Runner, int]]:
        """What is not on disk; side by side, the full cache goes along with whoever lacks an item.
        """
        missing = [(r, n) for r in self.runners for n in range(len(self.items)) if n not in r.raws]
        if self.task.lockstep:
            led = {n for _, n in missing}
            missing = [(self.full, n) for n in led] + [m for m in missing if m[0] is not self.full]
        return missing

    # -- side by side

    def _in_step(self) -> None:
        others = self.runners[1:]
        for number in range(len(self.items)):
            todo = [r for r in alive(others) if number not in r.raws]
            if todo or number not in self.full.raws:
                with failing(self.folder, self.task.awaited, self.full, *todo):
                    self._step_through(number, todo)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # of the captured steps of caches that are gone
            self._note(number)

    def _step_through(self, number: int, todo: list[Runner]) -> None:
        """One item through the full cache and `todo`, which all see its logits at each step."""
        full, item, task = self.full, self.items[number], self.task
        found: dict[int, list[dict]] = {id(r): [] for r in (full, *todo)}
        with full.leading(item.name):
            full.start()
        for runner in todo:
            with runner.surviving(item.name):
                runner.start()
        for span in task.steps(item, full.chunk_tokens):
            with full.leading(item.name):
                logits, scores = task.step(full, item, span)
                found[id(full)].append(scores)
                self._stepped(full, item, span)
            for runner in alive(todo):
                with runner.surviving(item.name):
                    found[id(runner)].append(task.step(runner, item, span, logits)[1])
                self._stepped(runner, item, span)
        with full.leading(item.name):
            self._end(full, number, found)
        for runner in alive(todo):
            with runner.surviving(item.name):
                self._end(runner, number, found)

    def _stepped(self, runner: Runner, item: Item, span: tuple[int, int]) -> None:
        name, kind, work = runner.name, self.task.kind(item, span), self.bar.work
        work.spend(self.part, name, kind)
        work.done(self.part, name, {kind: span[1] - span[0]})
        if runner.failure is not None:
            work.drop(name)
        self.bar.show()

    def _end(self, runner: Runner, number: int, found: dict[int, list[dict]]) -> None:
        runner.finish()
        steps = [step for step in found[id(runner)] if step]
        runner.raws[number] = {k: joined([step[k] for step in steps]) for k in steps[0]}
        self.scores.keep(runner, number, self.tokens[number])

    def _note(self, number: int) -> None:
        """What is known of an item before the others are through."""
        there = [r for r in alive(self.runners) if number in r.raws]
        for runner in there:
            rows = self.task.item_rows(runner, number)
            self.folder.add(runner.name, runner.params, rows, step=number + 1)
        self.folder.history(number, {
            f"{r.name}/{name}_mean": float(np.mean(r.raws[number][name]))
            for r in there for name in self.task.history
        })

    # -- one after the other

    def _one_by_one(self) -> None:
        missing = self._missing()
        for runner in self.runners:
            guard = runner.leading if runner is self.full else runner.surviving
            runner.told = partial(self.bar.work.spend, self.part, runner.name)
            with failing(self.folder, self.task.awaited, runner):
                for number in (n for r, n in missing if r is runner):
                    self._measure(runner, number, guard)
                    self._through(runner, number)
            runner.leave()
            self._write(self.runners[: self.runners.index(runner) + 1])

    def _through(self, runner: Runner, number: int) -> None:
        amounts, work = self.amounts(self.items[number]), self.bar.work
        runner.told("answer" if amounts.get("answer") else "read")
        work.done(self.part, runner.name, amounts)
        if runner.failure is not None:
            work.drop(runner.name)
        self.bar.show()

    def _measure(self, runner: Runner, number: int, guard: Callable) -> None:
        """One item, unless the runner has failed on an earlier one."""
        if runner.failure is not None:
            return
        item, before = self.items[number], len(runner.stats)
        with guard(item.name):
            raw = self.task.run(runner, item)
            if len(runner.stats) == before:
                runner.account()
            runner.release()
            runner.raws[number] = raw
            self.scores.keep(runner, number, self.tokens[number], len(runner.stats) - before)

    # -- rows

    def _write(self, through: list[Runner]) -> None:
        """Rows of those that are `through` with all that they are paired with.

        What is paired comes also where a runner was done in the run before: then the other one may
        have failed there.
        """
        everyone, there = alive(self.runners), {id(r) for r in through}
        pairs = list(companions(everyone, self.full.chunk_tokens))
        for runner in everyone:
            others = [other for one, _, other in pairs if one is runner]
            late = self.task.pairs_all and len(through) < len(self.runners)
            if late or any(id(r) not in there for r in (runner, *others)):
                return
            if id(runner) not in self._written:
                self._written.add(id(runner))
                self._write_one(runner, list(self._beside(runner, everyone, pairs)))

    def _write_one(self, runner: Runner, beside: list[Measurement]) -> None:
        task, rows = self.task, beside
        if not done(self.folder, runner, task.awaited):
            task.details(self.folder, runner, self.full, self.items, self.seed)
            held = memory(runner) if task.accounts else ()
            rows = [*task.rows(runner, self.full, self.seed), *held, *beside]
        self.folder.add(runner.name, runner.params, awaited_last(rows, task.awaited))

    def _beside(self, runner, everyone: list[Runner], pairs: list) -> Iterator[Measurement]:
        """Rows that pair a runner with others than the full cache."""
        for one, kind, other in pairs:
            if one is runner:
                yield from self.task.against(runner, kind, other, self.seed)
        for other in everyone:
            yield from self.task.versus(runner, other, self.seed)


def joined(parts: list) -> np.ndarray:
    """Arrays in a row; tensors come from their device here, all at once."""
    if torch.is_tensor(parts[0]):
        return torch.cat(parts).cpu().numpy()
    return np.concatenate(parts)


def with_companions(runners: list[Runner]) -> list[Runner]:
    """`runners`, and behind each the controls of its that did not come yet."""
    pairs, order = list(companions(runners, runners[0].chunk_tokens)), {}
    for runner in sorted(runners, key=lambda r: r.is_control):
        for one in (runner, *(other for mine, _, other in pairs if mine is runner)):
            order.setdefault(id(one), one)
    return list(order.values())
