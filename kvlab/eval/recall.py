"""Recall: does a compressed cache still find a fact in a long document? Paired with the full cache.

The document goes through the cache in prefill chunks, and all that the axes do to it (evict, seal,
summarize, spill) happens then. Only afterwards comes a question, in pieces of `question_tokens` (1:
through the decode path; 64: one small chunk), so that no policy has seen it. `query_aware` is the
other experiment: the question is part of the document's last chunk, and policies that score by the
last queries know what will be asked (as SnapKV is usually measured); what left in earlier chunks
left without it.

The answer is fed behind the question in the same pieces. It is right if every token of the code is
the likeliest one, which is the same as greedy decoding giving exactly the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvlab import stats
from kvlab.core import BadInput, KvlabError, Measurement, Variant
from kvlab.eval.base import Runner, awaited_last, check_chunk, done, failing
from kvlab.eval.controls import companions
from kvlab.eval.data import Document
from kvlab.eval.needle import Prompt, Question, SecretNumber
from kvlab.eval.quality import memory, spread
from kvlab.eval.scores import Scores
from kvlab.eval.setting import Setting
from kvlab.model.load import LoadedModel
from kvlab.model.prefill import forward_chunk
from kvlab.model.progress import shown

AWAITED = "needle_recall_percent"  # what a runner has that is through all prompts
CELL = "needle_recall_at_percent"  # one cell of the heatmap; the report draws it, tables leave it


@dataclass
class Answers:
    """What one runner answered: one array per prompt, an element per question."""

    runner: Runner
    hits: list[np.ndarray] = field(default_factory=list)   # 1.0: exactly the code
    nats: list[np.ndarray] = field(default_factory=list)   # mean loss of the code's tokens

    @property
    def columns(self) -> dict[str, list[np.ndarray]]:
        return {"hits": self.hits, "nats": self.nats}


class Recall:
    """Needles at depths x lengths, every variant against the full cache on the same prompts.

    model, data: a loader and a source of documents. needle: the task.
    documents: taken from `data` (null: all that are long enough). trials: prompts of each document
        for each cell of the heatmap, so a cell rests on documents x trials questions.
    lengths: tokens of a context. depths: percent of it before the needle.
    needles: in one prompt, at different depths; more share one prefill, and distract. Questions
        after the first go back to the end of the document: what the first one made a policy evict
        (at most its own length) stays evicted.
    question_tokens, query_aware: how the question comes; see the module's text.
    chunk_tokens, baseline, progress, device, cap_gb, seed: as in `Evaluate`.
    controls: add negative controls, see `controls`.
    """

    wants_specs = True

    def __init__(
        self, model, data, needle: SecretNumber, documents: int | None = 3, trials: int = 2,
        lengths: Sequence[int] = (2048, 4096), depths: Sequence[float] = (0, 25, 50, 75, 100),
        needles: int = 1, question_tokens: int = 1, query_aware: bool = False,
        chunk_tokens: int | str = 512, baseline: str = "bf16", controls: bool = True,
        progress: bool = True, device: str = "auto", cap_gb: float | None = None, seed: int = 0,
    ):
        check_chunk(chunk_tokens)
        for name, value in (("trials", trials), ("question_tokens", question_tokens)):
            if value < 1:
                raise BadInput(f"eval.{name}", value, "must be at least 1")
        if not lengths or not depths or any(not 0 <= d <= 100 for d in depths):
            raise BadInput("eval.depths", list(depths), "give lengths, and depths of 0 to 100 %")
        if not 1 <= needles <= len(depths):
            raise BadInput("eval.needles", needles, f"must be 1 to {len(depths)}, one a depth")
        self.data, self.needle, self.documents, self.trials = data, needle, documents, trials
        self.lengths, self.depths, self.needles = sorted(lengths), list(depths), needles
        self.question_tokens, self.query_aware = question_tokens, query_aware
        self.progress, self.seed = progress, seed
        self.setting = Setting(model, chunk_tokens, baseline, controls, device, cap_gb)

    def run(self, folder, variants: list[Variant]) -> None:
        """Measure all variants at all lengths that `folder` does not hold yet."""
        loaded = self.setting.load()
        documents = None
        for length in self.lengths:
            runners = self.setting.runners(loaded, variants, self._params(length))
            if all(done(folder, runner, AWAITED) for runner in runners):
                continue
            if documents is None:  # of the longest length: shorter contexts are pieces of them
                count = self.documents
                documents = self.data.documents(loaded.tokenizer, count, max(self.lengths))
            prompts = [
                p for n, d in enumerate(documents) for p in self._prompts(loaded, d, n, length)
            ]
            self._write(folder, self._answers(folder, loaded, prompts, length, runners))

    def _params(self, length: int) -> dict:
        return {
            "tokens": length, "needle": self.needle.name, "needles": self.needles,
            "question_tokens": self.question_tokens, "query_aware": self.query_aware,
        }

    def _answers(
        self, folder, loaded: LoadedModel, prompts: list[Prompt], length: int, runners: list[Runner]
    ) -> list[Answers]:
        """Answers to the same prompts, one runner after the other, of those that have them all;
        what is on disk is taken from there."""
        scores, tokens = Scores(folder), [prompt.tokens() for prompt in prompts]
        full = runners[0]
        todo = [r for r in runners if r is full or not done(folder, r, AWAITED)
                or scores.holds(r, tokens)]
        everyone = [Answers(runner) for runner in todo]
        total = len(prompts) * len(todo) * length
        with shown(self.progress, total, f"recall at {length} tokens") as show:
            for place, answers in enumerate(everyone):
                guard = full.leading if answers.runner is full else answers.runner.surviving
                with failing(folder, AWAITED, answers.runner):
                    for number, prompt in enumerate(prompts):
                        self._answer(loaded, scores, answers, number, prompt, guard)
                        show((place * len(prompts) + number + 1) * length)
        return [answers for answers in everyone if answers.runner.failure is None]

    def _answer(self, loaded, scores: Scores, answers: Answers, number: int, prompt: Prompt, guard):
        """One prompt, unless it is on disk, or the runner has failed on an earlier one."""
        runner, tokens = answers.runner, prompt.tokens()
        if runner.failure or scores.take(runner, number, tokens, answers.columns):
            return
        before = len(runner.stats)
        with guard(f"{prompt.document}, prompt {number + 1}"):
            hits, nats = np.array(self._ask_all(loaded, runner, prompt), dtype=np.float64).T
            answers.hits.append(hits)
            answers.nats.append(nats)
        if runner.failure is None:
            accounts = len(runner.stats) - before
            scores.keep(runner, number, tokens, answers.columns, accounts)

    def _prompts(self, loaded, document: Document, index: int, length: int) -> Iterator[Prompt]:
        """The same prompts for every runner and every start: drawn from the seed alone."""
        for trial in range(self.trials):
            for first in range(0, len(self.depths), self.needles):
                depths = self.depths[first : first + self.needles]
                rng = np.random.default_rng([self.seed, index, length, trial, first])
                yield self.needle.prompt(loaded.tokenizer, document, length, depths, rng)

    def _ask_all(self, loaded, runner: Runner, prompt: Prompt) -> list[tuple[bool, float]]:
        found = []
        for number, question in enumerate(prompt.questions):
            if number == 0 or self.query_aware or not back_to(runner, len(prompt.context)):
                self._read(loaded, runner, prompt, question)
                runner.stats.append(runner.cache.stats())  # of the document, without questions
            found.append(self._ask(loaded, runner, question))
        runner.release()
        return found

    def _read(self, loaded, runner: Runner, prompt: Prompt, question: Question) -> None:
        """The document into an empty cache; its last chunk has the question where it may."""
        if runner.cache is not None:
            runner.release()
        runner.start(loaded)
        ids = prompt.context
        if self.query_aware:  # all of it but one token, which asks
            ids = np.concatenate([ids, question.ids[:-1]])
        size = self.setting.chunk_tokens
        for start in range(0, len(ids), size):
            self._step(loaded, runner, ids[start : start + size])

    def _ask(self, loaded, runner: Runner, question: Question) -> tuple[bool, float]:
        """Whether the answer is right, and the mean loss of its tokens in nats."""
        asked = question.ids[-1:] if self.query_aware else question.ids
        ids = np.concatenate([asked, question.answer[:-1]])
        size = self.question_tokens
        starts = range(0, len(ids), size)
        parts = [self._step(loaded, runner, ids[i : i + size], last=False) for i in starts]
        answer = torch.from_numpy(question.answer).to(parts[0].device)
        logits = torch.cat(parts)[-len(answer) :].float()
        nats = torch.nn.functional.cross_entropy(logits, answer)
        return bool((logits.argmax(-1) == answer).all()), float(nats)

    def _step(self, loaded, runner: Runner, ids: np.ndarray, last: bool = True) -> Tensor:
        """Logits [T, V] after `ids` [T], or after the last of them only."""
        part = torch.from_numpy(ids).to(loaded.model.device)[None]
        return forward_chunk(loaded.model, part, runner.cache, last=last)[0]

    def _write(self, folder, everyone: list[Answers]) -> None:
        """Rows over all prompts of one length; what is paired with another one comes first where a
        runner is done: the other one may have failed in the run before."""
        for answers in everyone:
            if done(folder, answers.runner, AWAITED):
                rows = self._beside(folder, answers, everyone)
                folder.add(answers.runner.name, answers.runner.params, rows)
        for answers in everyone:
            runner = answers.runner
            if not done(folder, runner, AWAITED):
                self._cells(folder, answers)
                rows = [*recalled(answers, everyone[0], self.seed), *memory(runner),
                        *self._beside(folder, answers, everyone)]
                folder.add(runner.name, runner.params, awaited_last(rows, AWAITED))

    def _cells(self, folder, answers: Answers) -> None:
        runner, asked = answers.runner, [*range(0, len(self.depths), self.needles)]
        for place, depth in enumerate(self.depths):
            group, inside = divmod(place, self.needles)
            cell = [h[inside : inside + 1] for h in answers.hits[group :: len(asked)]]
            row = share(CELL, cell, self.seed)
            folder.add(runner.name, runner.params | {"depth_percent": depth}, [row])

    def _beside(
        self, folder, answers: Answers, everyone: list[Answers]
    ) -> Iterator[Measurement]:
        """Rows that pair one with its negative controls."""
        by_runner = {id(a.runner): a for a in everyone}
        found = companions([a.runner for a in everyone], self.setting.chunk_tokens)
        for one, kind, other in found:
            name = f"needle_recall_minus_{kind}_points"
            if one is answers.runner and not done(folder, one, name):
                delta = paired(answers.hits, by_runner[id(other)].hits, self.seed)
                count = sum(map(len, answers.hits))
                yield Measurement(name, *spread(delta, "points", "higher", count))


def back_to(runner: Runner, length: int) -> bool:
    """Forget the last question and answer; False where what they share a block with is gone."""
    try:
        runner.cache.crop(length - runner.cache.get_seq_length())
    except KvlabError:
        return False
    return True


def recalled(answers: Answers, full: Answers, seed: int) -> Iterator[Measurement]:
    """Recall, the full cache's, and the paired differences.

    Questions are what is resampled: each has a place, a name and a code of its own.
    """
    yield share("needle_recall_percent", answers.hits, seed)
    yield share("needle_recall_full_percent", full.hits, seed)
    delta, count = paired(answers.hits, full.hits, seed), sum(map(len, answers.hits))
    yield Measurement("needle_recall_delta_points", *spread(delta, "points", "higher", count))
    nats = np.concatenate(answers.nats) - np.concatenate(full.nats)
    lost = stats.mean_interval([nats], block=1, seed=seed)
    yield Measurement("needle_answer_delta_nats", *spread(lost, "nats", "lower", count))


def share(name: str, hits: list[np.ndarray], seed: int) -> Measurement:
    """Right answers in percent; the bootstrap's interval, cut to what a share can be."""
    found = stats.proportion_percent([np.concatenate(hits)], block=1, seed=seed)
    low, high = (None if x is None else min(100.0, max(0.0, x)) for x in found[1:])
    return Measurement(name, found.value, "%", "higher", low, high, sum(map(len, hits)))


def paired(hits: list[np.ndarray], full: list[np.ndarray], seed: int) -> stats.Interval:
    """The difference in percentage points.

    Where all questions differ alike no resample can; then the exact binomial bound on the share of
    questions that would not stands on both sides.
    """
    differences = 100 * (np.concatenate(hits) - np.concatenate(full))
    if np.ptp(differences):
        return stats.mean_interval([differences], block=1, seed=seed)
    bound, value = 100 * (1 - 0.025 ** (1 / len(differences))), float(differences[0])
    return stats.Interval(value, max(-100.0, value - bound), min(100.0, value + bound))
