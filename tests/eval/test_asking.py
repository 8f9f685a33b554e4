"""Answers in generated text: how they are judged, where they end, and what a cell is."""

from __future__ import annotations

import numpy as np
import pytest

from kvlab.cache import CacheSpec
from kvlab.core import BadInput
from kvlab.eval import Asking, Bench, Item, Question
from kvlab.eval.asking import cut
from kvlab.eval.runner import Runner
from kvlab.eval.scorers import scorer
from kvlab.model.load import ReferenceModel
from kvlab.track import RunFolder


def asked(*texts, options=()):
    return Question(np.zeros(1, dtype=np.int64), texts=texts, options=options)


@pytest.mark.parametrize("name, text, question, score", [
    ("exact", " blue \n", asked("blue"), 1), ("exact", "bluer", asked("blue"), 0),
    ("exact", "red", asked("blue", "red"), 1),
    ("contains_all", "Red, then BLUE", asked("blue", "red", "green"), 2 / 3),
    ("contains_any", "it was blue", asked("green", "blue"), 1),
    ("contains_any", "it was", asked("green", "blue"), 0),
    ("copied_prefix", " abcx", asked("abcdefgh"), 3 / 8), ("copied_prefix", "", asked("ab"), 0),
    ("copied_prefix", "abcd and more", asked("abcd", "zz"), 1),
    ("chosen", "I say B, not A", asked("B", options=("A", "B")), 1),
    ("chosen", "Ascot or B", asked("B", options=("A", "B")), 1),
    ("chosen", "none of them", asked("B", options=("A", "B")), 0),
    ("chosen", "New York", asked("New York", options=("New", "New York")), 1),
])  # fmt: skip
def test_scorers(name, text, question, score):
    assert scorer(name)(text, question) == pytest.approx(score)


def test_a_scorer_is_a_name_or_a_function():
    assert scorer(len) is len
    with pytest.raises(BadInput, match="known: exact, contains_all"):
        scorer("good")


@pytest.mark.parametrize("text, end", [
    ("blue\nred", "blue"), ("\n blue.", "\n blue"), ("blue", "blue"), ("", ""),
])  # fmt: skip
def test_an_answer_ends_at_its_stop_but_not_before_it_began(text, end):
    assert cut(text, ("\n", ".")) == end


class Empty(Asking):
    name = "empty"

    def items(self, model, data, seed):
        return []


def test_a_task_without_items_is_refused(tmp_path):
    with RunFolder(tmp_path / "run") as folder, pytest.raises(BadInput, match="has no items"):
        Bench(ReferenceModel(), Empty(), device="cpu", progress=False).run(folder, [])


@pytest.mark.parametrize("changes", [{"question_tokens": 0}, {"new_tokens": 0}, {"scorer": "x"},
                                     {"decode_driver": "fast"}])
def test_refuses_settings_that_ask_nothing(changes):
    with pytest.raises(BadInput):
        Asking(**changes)


class Greedy(Asking):
    name = "greedy"
    stop = ()


@pytest.mark.parametrize("question_tokens", [1, 4])
def test_answers_are_those_of_the_model_and_questions_do_not_see_each_other(question_tokens):
    """Each question's answer is what the model's own greedy decoding gives behind the context."""
    loaded = ReferenceModel().load("cpu")
    rng = np.random.default_rng(0)
    context, *asks = (rng.integers(5, 4000, n) for n in (60, 5, 7))
    runner = Runner("full", {}, CacheSpec(format="fp32", block_size=16), loaded=loaded,
                    chunk_tokens=32)  # fmt: skip
    task = Greedy(question_tokens, new_tokens=4, scorer=lambda text, question: 0.5)
    raw = task.run(runner, Item("one", context, tuple(Question(ids) for ids in asks)))
    assert raw["score"].tolist() == [0.5, 0.5] and len(runner.stats) == 1
    for ids, said in zip(asks, raw["answers"]):
        whole = [*context, *ids]
        for token in said[said >= 0]:
            alone = Runner("full", {}, runner.spec, loaded=loaded)
            alone.start()
            assert int(alone.read(np.array(whole))[-1].argmax()) == token
            whole.append(token)
