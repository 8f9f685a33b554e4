"""Tasks with a context and questions about it.

The context goes through the cache in prefill chunks, and all that the axes do to it (evict, seal,
summarize, spill) happens then. Only afterwards comes a question, in pieces of `question_tokens` (1:
through the decode path; 64: one small chunk), so that no policy has seen it. `query_aware` is the
other experiment: the question is part of the context's last chunk, and policies that score by the
last queries know what will be asked (as SnapKV is usually measured); what left in earlier chunks
left without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kvlab import stats
from kvlab.core import BadInput, Measurement
from kvlab.eval import scorers
from kvlab.eval.rows import interval, size
from kvlab.eval.runner import Runner
from kvlab.eval.task import Item, Question, Raw, Task
from kvlab.model import Driver, LoadedModel, check_driver


class Asking(Task):
    """Several questions may stand behind one context. After the first the cache goes back to the
    context's end: what the first one made a policy evict (at most its own length) stays evicted.
    Where blocks that are shared with the question are gone, the context is read again.

    question_tokens, query_aware: how the question comes; see the module's text.
    new_tokens: of an answer at most; it also ends with the model's end tokens or behind `stop`.
    scorer: a function (text, question) -> 0 to 1, or a name of `kvlab.eval.scorers`.
    decode_driver: of questions and answers that come one token at a time, see `Decoder`.
    """

    stop: tuple[str, ...] = ("\n",)

    def __init__(
        self, question_tokens: int = 1, query_aware: bool = False, new_tokens: int = 32,
        scorer: str = "exact", decode_driver: Driver = "auto",
    ):
        for name, value in (("question_tokens", question_tokens), ("new_tokens", new_tokens)):
            if value < 1:
                raise BadInput(f"eval.{name}", value, "must be at least 1")
        check_driver(decode_driver)
        self.question_tokens, self.query_aware = question_tokens, query_aware
        self.new_tokens, self.scorer = new_tokens, scorers.scorer(scorer)
        self.decode_driver = decode_driver

    def params(self) -> dict:
        return super().params() | {
            "question_tokens": self.question_tokens, "query_aware": self.query_aware,
            "new_tokens": self.new_tokens,
        }

    def run(self, runner: Runner, item: Item) -> Raw:
        runner.driver = self.decode_driver
        found = []
        for number, question in enumerate(item.questions):
            if number == 0 or self.query_aware or not runner.back_to(len(context_of(runner, item))):
                self.read(runner, item, question)
            asked = question.ids[question.seen :] if self.query_aware else question.ids
            found.append(self.answer(runner, asked, question))
        return {name: np.array([one[name] for one in found]) for name in found[0]}

    def read(self, runner: Runner, item: Item, question: Question) -> None:
        """The context into an empty cache; its last chunk has the question where it may."""
        runner.start()
        ids = context_of(runner, item)
        if self.query_aware:  # at least the last token asks
            ids = np.concatenate([ids, question.ids[: question.seen]])
        runner.fill(ids)

    def ask(self, runner: Runner, ids: np.ndarray) -> Tensor:
        """Logits [T, V] of what comes behind the context, `ids` [T]."""
        step = self.question_tokens
        if step == 1:
            return runner.decode(ids)
        return torch.cat([runner.read(ids[i : i + step]) for i in range(0, len(ids), step)])

    def answer(self, runner: Runner, asked: np.ndarray, question: Question) -> dict:
        """Numbers of one answer, `score` among them. Generated token by token, greedily."""
        tokens = self.said(runner, self.ask(runner, asked)[-1])
        return self.judged(runner.loaded, tokens, question)

    def said(self, runner: Runner, logits: Tensor) -> list[int]:
        """Tokens of an answer that begins with the likeliest of `logits` [V]. The last one was not
        read by the cache."""
        ends = end_ids(runner.loaded)

        def ended(tokens: list[int]) -> bool:
            if tokens[-1] in ends or not self.stop:
                return tokens[-1] in ends
            told = text_of(runner.loaded, tokens)
            return cut(told, self.stop) != told

        return runner.generate(logits, self.new_tokens, ended)

    def judged(self, loaded: LoadedModel, tokens: list[int], question: Question) -> dict:
        """What is kept of an answer, whoever gave it: `score`, and its tokens as `answers`
        [new_tokens], -1 behind the last."""
        kept = np.full(self.new_tokens, -1, dtype=np.int64)
        kept[: len(tokens)] = tokens
        return self.marks(cut(text_of(loaded, tokens), self.stop), question) | {"answers": kept}

    def marks(self, text: str, question: Question) -> dict[str, float]:
        """Numbers from 0 to 1 of an answer's text, `score` among them."""
        return {"score": float(self.scorer(text, question))}

    def rows(self, mine: Runner, full: Runner, seed: int) -> Iterator[Measurement]:
        yield from super().rows(mine, full, seed)
        if lengths := [(raw >= 0).sum(1) for raw in mine.column("answers")]:
            found = stats.mean_interval([np.concatenate(lengths)], block=1, seed=seed)
            name = f"{self.of_rows}_answer_tokens"
            yield interval(name, found, "tokens", None, size(lengths))


class Forced(Asking):
    """Answers that are known to the token: they are fed behind the question in the same pieces,
    and are right if every token is the likeliest one, which is the same as greedy decoding giving
    exactly them. `nats` is the mean loss of the answer's tokens."""

    score = "hits"

    def answer(self, runner: Runner, asked: np.ndarray, question: Question) -> dict:
        logits = self.ask(runner, np.concatenate([asked, question.answer[:-1]]))
        answer = torch.as_tensor(question.answer, dtype=torch.long, device=logits.device)
        logits = logits[-len(answer) :].float()
        nats = torch.nn.functional.cross_entropy(logits, answer)
        return {"hits": float((logits.argmax(-1) == answer).all()), "nats": float(nats)}


def context_of(runner: Runner, item: Item) -> np.ndarray:
    """Tokens that this runner has in front of a question."""
    return item.context if runner.reads else item.blank


def text_of(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    return loaded.tokenizer.decode(tokens, skip_special_tokens=True)


def end_ids(loaded: LoadedModel) -> set[int]:
    """Tokens with which the model ends an answer."""
    told = getattr(loaded.model.generation_config, "eos_token_id", None)
    several = told if isinstance(told, list) else [told]
    return {loaded.tokenizer.eos_token_id, *several} - {None}


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of `stops`, space before it left out."""
    ends = [at for stop in stops if (at := text.find(stop, len(text) - len(text.lstrip()))) >= 0]
    return text[: min(ends, default=len(text))]
