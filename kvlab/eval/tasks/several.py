"""Several questions on one context, in the two ways of SCBench (https://arxiv.org/abs/2412.10319).

*Turns*: questions and the model's own answers stay in the conversation; a cache that was
compressed for the first question has to serve the last one. *Requests*: each question comes alone
behind the same context; a cache that shares prefixes computes the context once, any other cache
each time. What is said of time is that of the first token of each request but the first.

After github.com/microsoft/MInference, scbench/ (MIT): kv and vt are worded as there, the strings of
prefix_suffix are worded here. Contexts are fitted to a length in the model's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from string import ascii_lowercase, digits
from time import perf_counter

import numpy as np

from kvlab import stats
from kvlab.core import Measurement
from kvlab.eval import rows
from kvlab.eval.asking import context_of, end_ids
from kvlab.eval.clock import synchronize
from kvlab.eval.runner import Runner
from kvlab.eval.task import Item, Raw
from kvlab.eval.tasks.drawn import Drawn
from kvlab.eval.tasks.infinite import as_json, looked_up
from kvlab.eval.tasks.lists import VariableTracking, hidden_chain
from kvlab.eval.tasks.wording import Asked, Prompt
from kvlab.eval.tasks.words import NOISE, capitals, distinct, uuid

QUESTIONS = 5  # on one context


class Several(Drawn):
    """A member has a context with several questions; `turns` says how they come."""

    def params(self) -> dict:
        return super().params() | {"mode": "turns" if self.turns else "requests"}

    def run(self, runner: Runner, item: Item) -> Raw:
        runner.driver = self.decode_driver
        found = list((conversation if self.turns else requests)(self, runner, item))
        return {name: np.array([one[name] for one in found]) for name in found[0]}

    def rows(self, mine: Runner, full: Runner, seed: int) -> Iterator[Measurement]:
        yield from super().rows(mine, full, seed)
        own, theirs = ([np.atleast_2d(a) for a in r.column("answers")] for r in (mine, full))
        same = [(a == b).all(-1).mean(keepdims=True) for a, b in zip(own, theirs)]
        yield rows.share("task_same_answers_percent", same, seed)
        if not self.turns:
            own, theirs = ([x[1:] for x in runner.column("ttft")] for runner in (mine, full))
            found = stats.mean_interval([1e3 * x for x in own], block=1, seed=seed, least=0.0)
            yield rows.interval("task_ttft_ms", found, "ms", "lower", rows.size(own))
            saved = [100 * (1 - a / b) for a, b in zip(own, theirs)]
            found = stats.mean_interval(saved, block=1, seed=seed)
            yield rows.interval("task_ttft_saved_percent", found, "%", "higher", rows.size(own))


def conversation(task: Several, runner: Runner, item: Item) -> Iterator[dict]:
    """One question behind the other, each behind the answer before it."""
    left = []  # what of the last answer the cache has not read
    for number, question in enumerate(item.questions):
        asked = question.ids
        if number == 0:
            task.read(runner, item, question)
            asked = question.ids[question.seen :] if task.query_aware else asked
        logits = task.ask(runner, np.concatenate([np.array(left, dtype=np.int64), asked]))[-1]
        tokens = task.said(runner, logits)
        left = [] if tokens[-1] in end_ids(runner.loaded) else tokens[-1:]
        yield task.judged(runner.loaded, tokens, question)


def requests(task: Several, runner: Runner, item: Item) -> Iterator[dict]:
    """Each question as a request of its own, timed to its first token."""
    runner.start()
    for number, question in enumerate(item.questions):
        if number:
            runner.next_request()
        context, ids = context_of(runner, item), question.ids
        if task.query_aware:
            context, ids = np.concatenate([context, ids[: question.seen]]), ids[question.seen :]
        synchronize(runner.loaded.model.device)
        began = perf_counter()
        known = runner.open(np.concatenate([context, ids]))
        if known < len(context):
            runner.fill(context[known:])
        logits = task.ask(runner, ids[max(0, known - len(context)) :])[-1]
        logits.argmax(-1).item()
        took = perf_counter() - began
        told = task.judged(runner.loaded, task.said(runner, logits), question)
        yield told | {"ttft": took, "known": known}


class ScbenchKv(Several):
    """Values of five keys of a JSON object of uuids."""

    name = "scbench_kv"
    turns = True
    generates = 50
    copies = True
    stop = ("\n",)
    least = QUESTIONS
    BEFORE = "Extract the value corresponding to the specified key in the JSON object below.\n\n"

    def prompt(self, units: int, rng: Random) -> Prompt:
        pairs = [(uuid(rng), uuid(rng)) for _ in range(units)]
        places = rng.sample(range(units), QUESTIONS)
        asked = tuple(looked_up(*pairs[at], {"turn": n}) for n, at in enumerate(places, 1))
        context = f"{self.BEFORE}{as_json(pairs)}\n\n"
        return Prompt(context, asked, f"{self.BEFORE}{as_json([])}\n\n")


class ScbenchVt(Several):
    """Names that hold a value, of five values that were handed on through noise."""

    name = "scbench_vt"
    turns = True
    generates = 30
    exactly = False
    stop = ("\n",)
    hops = 2
    least = 3

    def prompt(self, units: int, rng: Random) -> Prompt:
        names = distinct(QUESTIONS * (self.hops + 1), lambda: capitals(5, rng))
        values = distinct(QUESTIONS, lambda: str(rng.randint(10_000, 99_998)))
        lines, asked = [NOISE] * units, []
        for number, value in enumerate(values):
            mine = names[number * (self.hops + 1) : (number + 1) * (self.hops + 1)]
            lines = hidden_chain(mine, value, lines, rng).split("\n")
            about = {"query": value, "num_v": len(mine)}
            asked.append(Asked(
                VariableTracking.QUESTION.format(**about),
                VariableTracking.PREFIX.format(**about).rstrip(), tuple(mine),
                {"turn": number + 1},
            ))
        before = VariableTracking.BEFORE
        return Prompt(f"{before}{chr(10).join(lines)}\n\n", tuple(asked), f"{before}\n\n")


class ScbenchPrefixSuffix(Several):
    """The one string of a long list that has a given beginning and end; five times."""

    name = "scbench_prefix_suffix"
    turns = True
    generates = 50
    copies = True
    stop = ("\n",)
    least, letters, shown = QUESTIONS, 20, 4
    BEFORE = "Below is a list of strings. I will ask for strings of this list.\n\n"

    def prompt(self, units: int, rng: Random) -> Prompt:
        ends, seen = {}, set()  # no two strings share beginning or end
        while len(ends) < units:
            text = "".join(rng.choices(ascii_lowercase + digits, k=self.letters))
            pair = text[: self.shown], text[-self.shown :]
            if not seen & {*pair}:
                seen |= {*pair}
                ends[text] = pair
        texts = list(ends)
        asked = tuple(
            Asked(f'Which string of the list begins with "{ends[text][0]}" and ends with '
                  f'"{ends[text][1]}"?', "The string is:", (text,), {"turn": number})
            for number, text in enumerate(rng.sample(texts, QUESTIONS), 1)
        )
        return Prompt(f"{self.BEFORE}{chr(10).join(texts)}\n\n", asked, f"{self.BEFORE}\n\n")


class ScbenchKvRequests(ScbenchKv):
    """The same, each question alone behind the shared object."""

    name = "scbench_kv_requests"
    turns = False


class ScbenchVtRequests(ScbenchVt):
    """The same, each question alone behind the shared text."""

    name = "scbench_vt_requests"
    turns = False


class ScbenchPrefixSuffixRequests(ScbenchPrefixSuffix):
    """The same, each question alone behind the shared list."""

    name = "scbench_prefix_suffix_requests"
    turns = False
