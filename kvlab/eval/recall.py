"""Task: does a compressed cache still find a fact in a long document?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np

from kvlab import stats
from kvlab.core import BadInput, Measurement
from kvlab.eval.asking import Forced
from kvlab.eval.needle import SecretNumber
from kvlab.eval.rows import interval
from kvlab.eval.runner import Runner
from kvlab.eval.task import Item
from kvlab.model import Driver


class Needles(Forced):
    """Facts at depths x lengths; an answer is right if greedy decoding gives exactly the code.

    needle: the wording; by default that of the bundled reference model. documents: taken from the
        data (null: all that are long enough). trials: prompts of each document for each cell of
        the heatmap, so a cell rests on documents x trials questions.
    lengths: tokens of a context. depths: percent of it before the needle.
    needles: in one prompt, at different depths; more share one prefill, and distract.
    question_tokens, query_aware, decode_driver: see `Asking`.
    """

    name = "needle_recall"

    def __init__(
        self, needle: SecretNumber | None = None, documents: int | None = 3, trials: int = 2,
        lengths: Sequence[int] = (2048, 4096), depths: Sequence[float] = (0, 25, 50, 75, 100),
        needles: int = 1, question_tokens: int = 1, query_aware: bool = False,
        decode_driver: Driver = "auto",
    ):
        super().__init__(question_tokens, query_aware, decode_driver=decode_driver)
        if trials < 1:
            raise BadInput("eval.trials", trials, "must be at least 1")
        if not lengths or not depths or any(not 0 <= d <= 100 for d in depths):
            raise BadInput("eval.depths", list(depths), "give lengths, and depths of 0 to 100 %")
        if not 1 <= needles <= len(depths):
            raise BadInput("eval.needles", needles, f"must be 1 to {len(depths)}, one a depth")
        self.needle, self.documents, self.trials = needle or SecretNumber(), documents, trials
        self.lengths, self.depths, self.needles = sorted(lengths), list(depths), needles
        self.length = self.lengths[0]  # of this part

    def parts(self, model) -> list[Needles]:
        found = []
        for length in self.lengths:
            found.append(copy(self))
            found[-1].length = length
        return found

    def params(self) -> dict:
        return {
            "tokens": self.length, "needle": self.needle.name, "needles": self.needles,
            "question_tokens": self.question_tokens, "query_aware": self.query_aware,
        }

    def items(self, model, data, seed: int) -> Iterator[Item]:
        """Drawn from the seed alone; a shorter context is a piece of the longest one's document."""
        documents = data.documents(model.tokenizer, self.documents, max(self.lengths))
        number = 0
        for index, document in enumerate(documents):
            for trial in range(self.trials):
                for first in range(0, len(self.depths), self.needles):
                    depths = self.depths[first : first + self.needles]
                    rng = np.random.default_rng([seed, index, self.length, trial, first])
                    made = self.needle.prompt(model.tokenizer, document, self.length, depths, rng)
                    number += 1
                    yield made._replace(name=f"{document.id}, prompt {number}")

    def rows(self, mine: Runner, full: Runner, seed: int) -> Iterator[Measurement]:
        yield from super().rows(mine, full, seed)
        nats = np.concatenate(mine.column("nats")) - np.concatenate(full.column("nats"))
        lost = stats.mean_interval([nats], block=1, seed=seed)
        yield interval("needle_answer_delta_nats", lost, "nats", "lower", len(nats))
