"""Prompts: of the asked length, with each fact once, at its depth, and never in a question."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from kvlab.core import BadInput
from kvlab.eval.data import Books
from kvlab.eval.needle import WORDS, ChatNeedle, SecretNumber, insert
from kvlab.model.load import REFERENCE

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_file=str(REFERENCE / "tokenizer.json"))


@pytest.fixture(scope="module")
def book(tokenizer):
    return Books().documents(tokenizer, 1, 4000)[0]


def made(task, tokenizer, book, depths=(0, 50, 100), length=600, seed=3):
    return task.prompt(tokenizer, book, length, depths, np.random.default_rng(seed))


def where(context, fact) -> list[int]:
    wide = np.lib.stride_tricks.sliding_window_view(context, len(fact))
    return np.flatnonzero((wide == fact).all(1)).tolist()


@pytest.mark.parametrize("length", [600, 1001, 3000])
def test_a_context_has_the_length_that_was_asked_for(tokenizer, book, length):
    assert len(made(SecretNumber(), tokenizer, book, length=length).context) == length


def test_each_code_stands_once_near_its_depth_and_in_no_question(tokenizer, book):
    prompt = made(SecretNumber(), tokenizer, book)
    for question in prompt.questions:
        [place] = where(prompt.context, question.answer)
        assert abs(100 * place / 600 - question.tags["depth_percent"]) < 12
        text = tokenizer.decode(question.ids)
        assert tokenizer.decode(question.answer).strip(" .") not in text
    names = {tokenizer.decode(q.ids) for q in prompt.questions}
    codes = {tuple(q.answer) for q in prompt.questions}
    assert len(names) == len(codes) == 3


def test_question_and_answer_are_what_the_reference_model_knows(tokenizer, book):
    question = made(SecretNumber(), tokenizer, book).questions[0]
    text = tokenizer.decode(np.concatenate([question.ids, question.answer]))
    thing = text.partition("number of ")[2].partition("?")[0]
    assert set(thing.split()) <= set(WORDS)
    code = text.rpartition(" is ")[2]
    assert text == (
        f" What is the secret number of {thing}? The secret number of {thing} is {code}"
    )
    assert len(code) == 7 and code[:6].isdigit() and code[6] == "."


def test_the_seed_decides(tokenizer, book):
    first, again = (made(SecretNumber(), tokenizer, book) for _ in range(2))
    other = made(SecretNumber(), tokenizer, book, seed=4)
    assert np.array_equal(first.context, again.context)
    assert not np.array_equal(first.context, other.context)


def test_facts_go_behind_sentences_in_the_order_of_their_depths(tokenizer):
    text = np.array(tokenizer("One is here. Two is there. Three is gone.")["input_ids"])
    got = tokenizer.decode(insert(tokenizer, text, [[17] * 3, [18] * 3], (90, 45)))
    assert got == "One is here.222 Two is there.111 Three is gone."


def test_chat_asks_inside_the_turns_of_a_template(tokenizer, book):
    tokenizer.chat_template = TEMPLATE
    prompt = made(ChatNeedle(), tokenizer, book)
    assert len(prompt.context) == 600
    assert tokenizer.decode(prompt.context).startswith("<|user|>Read this text.")
    question = tokenizer.decode(prompt.questions[1].ids)
    assert "<|end|><|assistant|>The access code of the" in question and question.endswith(" is")
    assert len(where(prompt.context, prompt.questions[1].answer)) == 1


def test_refusals(tokenizer, book):
    tokenizer.chat_template = None
    for task, length, words in (
        (ChatNeedle(), 600, "no chat template"),
        (SecretNumber(), 100, "leaves .* tokens of text"),
        (SecretNumber(), 5000, "has .* tokens only"),
    ):
        with pytest.raises(BadInput, match=words):
            made(task, tokenizer, book, length=length)
    with pytest.raises(BadInput, match="digits=0"):
        SecretNumber(0)
