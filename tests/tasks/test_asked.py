"""How items go through a cache: protocols, several questions, controls, rows."""

from __future__ import annotations

import numpy as np
import pytest

from kvlab.cache import CacheSpec
from kvlab.core import Variant
from kvlab.eval import Bench, Item, Question
from kvlab.eval.runner import Runner
from kvlab.eval.tasks import Drawn, Protocol, Several
from kvlab.model.load import ReferenceModel
from kvlab.track import RunFolder

SPEC = CacheSpec(format="fp32", block_size=16)
SHARED = CacheSpec(format="fp32", block_size=16, prefix="hash")


@pytest.fixture(scope="module")
def loaded():
    return ReferenceModel().load("cpu")


def numbers(count, seed):
    return np.random.default_rng(seed).integers(5, 4000, count)


class Fixed:
    """Items of random tokens, of 60 and three questions each."""

    name = "fixed"
    generates = 4
    questions = 3

    def items(self, model, data, seed):
        for number in range(2):
            asked = tuple(
                Question(numbers(5 + n, (number, n)), texts=("blue",), inside=3 + n,
                         tags={"turn": n}) for n in range(self.questions))
            yield Item(f"item {number}", numbers(60, number), asked, blank=numbers(7, 99))


class Turns(Fixed, Several):
    turns = True


class Requests(Fixed, Several):
    turns = False


class Single(Fixed, Drawn):
    questions = 1


def protocol(**changes):
    return Protocol(**({"samples": 2, "question_tokens": 8, "no_context": False} | changes))


def greedy(loaded, ids, count):
    """The likeliest tokens behind `ids`, each from a cold start."""
    ids, found = list(ids), []
    for _ in range(count):
        runner = Runner("cold", {}, SPEC, loaded=loaded)
        runner.start()
        found.append(int(runner.read(np.array(ids))[-1].argmax()))
        ids.append(found[-1])
    return found


def through(loaded, task, spec=SPEC, item=0, **changes):
    runner = Runner("mine", {}, spec, loaded=loaded, chunk_tokens=32, **changes)
    found = list(task.items(loaded, None, 0))[item]
    return task.run(runner, found), found, runner


@pytest.mark.parametrize("query_aware", [False, True])
def test_in_turns_each_question_stands_behind_the_answer_before(loaded, query_aware):
    task = Turns(protocol(query_aware=query_aware))
    raw, item, _ = through(loaded, task)
    ids = list(item.context)
    for question, said in zip(item.questions, raw["answers"]):
        ids += list(question.ids)
        right = greedy(loaded, ids, 4)
        assert said.tolist() == right
        ids += right


@pytest.mark.parametrize("spec", [SPEC, SHARED])
@pytest.mark.parametrize("query_aware", [False, True])
def test_requests_stand_alone_and_a_known_context_is_not_computed(loaded, spec, query_aware):
    task = Requests(protocol(query_aware=query_aware))
    raw, item, runner = through(loaded, task, spec)
    for question, said in zip(item.questions, raw["answers"]):
        assert said.tolist() == greedy(loaded, [*item.context, *question.ids], 4)
    known = [0, 48, 48] if spec is SHARED else [0, 0, 0]
    assert raw["known"].tolist() == known and (raw["ttft"] > 0).all()
    runner.release()


def test_who_does_not_read_gets_the_blank(loaded):
    raw, item, _ = through(loaded, Single(protocol()), reads=False)
    assert raw["answers"][0].tolist() == greedy(loaded, [*item.blank, *item.questions[0].ids], 4)


def test_what_is_inside_is_said_by_the_question(loaded, monkeypatch):
    read = []
    sound = Runner.fill
    monkeypatch.setattr(Runner, "fill", lambda self, ids: read.append(len(ids)) or sound(self, ids))
    for aware, tokens in ((False, 60), (True, 63)):
        raw, item, _ = through(loaded, Single(protocol(query_aware=aware)))
        assert read.pop() == tokens and not read
        assert raw["answers"][0].tolist() == greedy(
            loaded, [*item.context, *item.questions[0].ids], 4)


def test_rows_are_paired_by_item_and_controls_run_along(tmp_path):
    mass = Variant("attention_mass 50%", {"policy": "attention_mass"}, CacheSpec(
        policy="attention_mass", budget_percent=50, block_size=16))  # fmt: skip
    shared = Variant("hash", {"prefix": "hash"}, SHARED)
    task = Requests(protocol(no_context=True))
    assert not Single(protocol()).beside(None)
    with RunFolder(tmp_path / "run") as folder:
        Bench(ReferenceModel(), task, chunk_tokens=32, baseline="fp32", progress=False,
              device="cpu").run(folder, [mass, shared])
        rows = folder.rows()
    found = {(r["variant"], r["name"]): r for r in rows}
    everyone = {"full", "no context", mass.name, "random 50% (control)", "hash"}
    assert everyone <= {variant for variant, _ in found}
    assert found[mass.name, "task_score_percent"]["count"] == 2, "items, not questions"
    assert found[mass.name, "task_score_delta_points"]["value"] == 0
    assert ("no context", "task_score_minus_random_points") not in found
    assert found[mass.name, "task_score_minus_random_points"]["value"] == 0
    assert found["hash", "task_same_answers_percent"]["value"] == 100
    assert found["full", "task_ttft_ms"]["count"] == 4, "the first request of an item is cold"
    assert found["hash", "task_ttft_saved_percent"]["unit"] == "%"
    assert found["full", "task_answer_tokens"]["value"] == 4
    about = found[mass.name, "task_score_percent"]["params"]
    assert about["task"] == "fixed" and about["samples"] == 2 and not about["query_aware"]
    assert found["no context", "task_score_percent"]["params"]["control"].startswith("the question")
    assert about["mode"] == "requests"
    assert not any(r["name"].startswith("fixed") for r in rows)
