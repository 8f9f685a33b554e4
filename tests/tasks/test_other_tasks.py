"""InfiniteBench's, SCBench's and the written tasks: small prompts by hand, and what is right."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from spoken import Speaker

from kvlab.core import BadInput
from kvlab.eval import Question
from kvlab.eval.tasks import (
    GENERATED,
    RULER,
    CopyString,
    Countdown,
    KvRetrieval,
    MathFind,
    NumberString,
    Passkey,
    PathTraversal,
    Protocol,
    ScbenchKv,
    ScbenchPrefixSuffix,
    ScbenchVt,
    TableToText,
    Written,
)
from kvlab.eval.tasks.drawn import first_line, longest_prefix, recognised
from kvlab.eval.tasks.fitting import dice
from kvlab.eval.tasks.infinite import found_in
from kvlab.eval.tasks.written import lines_right, searched, tried

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLAB_CACHE", str(tmp_path / "cache"))


def prompt(cls, units, **more):
    task = cls(**more)
    return task.prompt(units, dice(task, "item", 0))


def asked(text):
    return Question(np.zeros(1, dtype=np.int64), texts=(text,))


def test_passkey_line_by_line():
    made = prompt(Passkey, 3)
    [one] = made.asked
    [key] = one.texts
    head, _, body = made.context.partition("\n\n")
    assert head == ("There is an important info hidden inside a lot of irrelevant text. Find it and"
                    " memorize them. I will quiz you about the important information there.")
    lines = body.removesuffix("\n\n\n").split("\n")
    told = f"The pass key is {key}. Remember it. {key} is the pass key."
    assert sorted(lines) == sorted([NOISE] * 3 + [told]) and re.fullmatch(r"\d{5}", key)
    assert one[:2] == ("What is the pass key?", "The pass key is")
    assert len(prompt(Passkey, 3, digits=64).asked[0].texts[0]) == 64


def test_a_number_string_has_doubled_digits():
    [one] = prompt(NumberString, 3).asked
    assert len(one.texts[0]) == 10
    assert sum(a == b for a, b in zip(one.texts[0], one.texts[0][1:])) >= 5
    assert one.prefix == "The sequence of digits is"


def test_kv_retrieval_is_json():
    made = prompt(KvRetrieval, 4)
    [one] = made.asked
    pairs = json.loads(made.context.partition("JSON data:\n")[2])
    assert len(pairs) == 4 and one.question == f'Key: "{one.question[6:-1]}"'
    assert pairs[one.question[6:-1]] == one.texts[0]


@pytest.mark.parametrize("what, right", [
    ("largest number", "9"), ("second largest number", "7"), ("third largest number", "5"),
    ("smallest number", "3"), ("second smallest number", "5"), ("third smallest number", "7"),
    ("median", "5"),
])  # fmt: skip
def test_math_find_knows_the_answer(what, right):
    assert found_in([9, 9, 7, 5, 3, 3], what) == right


def test_math_find_takes_the_first_number():
    task = MathFind()
    assert task.marks("It is 42, not 7", asked("42"))["score"] == 1
    assert task.marks("7 or 42", asked("42"))["score"] == 0


def test_scbench_asks_five_times():
    made = prompt(ScbenchKv, 9)
    pairs = json.loads(made.context.partition("JSON data:\n")[2])
    assert [pairs[one.question[6:-1]] for one in made.asked] == [o.texts[0] for o in made.asked]
    assert len({o.texts for o in made.asked}) == 5
    made = prompt(ScbenchPrefixSuffix, 9)
    strings = made.context.strip().split("\n\n")[1].split("\n")
    for one in made.asked:
        begin, end = re.findall(r'"(\w{4})"', one.question)
        assert [s for s in strings if s.startswith(begin)] == list(one.texts) == [
            s for s in strings if s.endswith(end)]  # fmt: skip


def test_scbench_vt_hands_five_values_on():
    made = prompt(ScbenchVt, 6)
    assert made.context.count(NOISE) == 6
    for one in made.asked:
        value = re.search(r"\d+", one.question).group()
        a, b, c = one.texts
        places = [made.context.index(x) for x in (
            f"VAR {a} = {value}\n", f"VAR {b} = VAR {a} \n", f"VAR {c} = VAR {b} \n")]  # fmt: skip
        assert places == sorted(places)


def test_a_search_is_written_as_its_rules_say():
    assert searched([6, 3, 2], 4) == [
        "6 + 3 = 9, left 2 9", "9 + 2 = 11, left 11", "9 - 2 = 7, left 7", "9 * 2 = 18, left 18",
        "6 - 3 = 3, left 2 3", "3 + 2 = 5, left 5", "3 - 2 = 1, left 1", "3 * 2 = 6, left 6",
        "6 * 3 = 18, left 2 18", "18 + 2 = 20, left 20", "18 - 2 = 16, left 16",
        "18 * 2 = 36, left 36", "18 / 2 = 9, left 9",
        "6 / 3 = 2, left 2 2", "2 + 2 = 4, left 4 = target",
    ]  # fmt: skip
    for step, left in tried([5, 4, 3, 7]):
        a, sign, b, _, result = step.split()
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b),
                 "/": int(a) / int(b)}[sign]
        assert value == int(result) == left[-1] > 0
    made = prompt(Countdown, 12)
    answer = made.asked[0].texts[0].splitlines()
    assert 6 <= len(answer) <= 12 and answer[-1].endswith("= target")
    assert made.context.rstrip().endswith("= target"), "a worked example"


def test_a_route_is_the_only_one():
    made = prompt(PathTraversal, 5)
    [one] = made.asked
    legs = dict(re.findall(r"From (\w+) you can travel by (\w+ to \w+)\.", made.context))
    assert len(legs) == 11 and len(set(legs)) == 11
    at, end = re.search(r"route from (\w+) to (\w+)\.", one.question).groups()
    for line in one.texts[0].splitlines():
        by, _, to = legs[at].split()
        assert line == f"From {at}, take a {by} to {to}."
        at = to
    assert at == end


def test_a_sentence_for_each_row():
    made = prompt(TableToText, 3)
    rows = [r.strip("| ").split(" | ") for r in made.context.strip().splitlines()[2:]]
    assert made.asked[0].texts[0].splitlines() == [
        f"{name} is a {job} of {age} years who lives in {city}." for name, age, job, city in rows]
    made = prompt(CopyString, 3)
    assert made.context.strip().split("\n", 1)[1] == made.asked[0].texts[0]


@pytest.mark.parametrize("text, share", [
    ("a\nb\nc", 1), ("a\nb", 2 / 3), (" a \nx\nc", 1 / 3), ("", 0), ("a\nb\nc\nd", 1),
])  # fmt: skip
def test_lines_are_right_up_to_the_first_wrong_one(text, share):
    assert lines_right(text, asked("a\nb\nc")) == pytest.approx(share)


# -- what is told of an answer


@pytest.mark.parametrize("text, copied, miscopied, exact", [
    (" 1234567.", 1, 0, 1), ("It is 1234567", 1, 0, 0), ("1234597", 5 / 7, 1, 0),
    ("123", 3 / 7, 0, 0), ("1234", 4 / 7, 1, 0), ("9999999", 0, 0, 0), ("", 0, 0, 0),
    ("12 1234567\nmore", 1, 0, 0), ("**1234567**\nmore", 1, 0, 1),
])  # fmt: skip
def test_found_but_miscopied_is_a_class_of_its_own(text, copied, miscopied, exact):
    told = Passkey().marks(text, asked("1234567"))
    assert told["copied"] == pytest.approx(copied) and told["miscopied"] == miscopied
    assert told["exact"] == exact and told["score"] == (copied == 1)


def test_what_is_copied_is_the_longest_beginning_anywhere():
    assert longest_prefix("ab abc abd", "abcd") == 3 and longest_prefix("bcd", "abcd") == 0
    assert longest_prefix("aaab", "aab") == 3 and longest_prefix("", "a") == 0
    assert [recognised("1" * n) for n in (1, 2, 5, 7, 10, 36)] == [1, 1, 4, 4, 5, 18]
    assert first_line('"1234."\nand so on') == "1234"


@pytest.mark.parametrize("cls", [c for c in GENERATED if c not in RULER])
def test_items_fit_their_length(cls):
    speaker = Speaker()
    task = cls(Protocol(lengths=[2400], answer_tokens=[160], samples=2))
    [part] = task.parts(speaker)
    for item in part.items(speaker, None, 0):
        sizes = [len(q.ids) + part.new_tokens for q in item.questions]
        if isinstance(part, Written):
            right = len(speaker.tokenizer(item.questions[0].texts[0])["input_ids"])
            assert 60 < right <= 160 and part.params()["answer_tokens"] == 160
            assert part.new_tokens == 208
        else:
            total = len(item.context) + (sum(sizes) if part.turns else max(sizes))
            assert 1900 < total <= 2400
    between = speaker.tokenizer.decode(item.questions[-1].ids)
    assert between.startswith("</assistant>\n<user>\n") == part.turns


def test_settings_that_ask_nothing_are_refused():
    for changes in ({"samples": 0}, {"lengths": []}, {"answer_tokens": [0]}, {"new_tokens": 0},
                    {"decode_driver": "fast"}):
        with pytest.raises(BadInput):
            Protocol(**changes)
    with pytest.raises(BadInput, match="has no chat template"):
        Passkey(Protocol(chat="template")).parts(Speaker(chat=False))

