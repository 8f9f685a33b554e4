"""Summaries in words: the prompt is rewritten in time, by a model that says what we can foresee."""

from __future__ import annotations

import pytest
import torch

from kvlab.core import BadInput, KvlabError
from kvlab.model import PagedCache, TextSummary, prefill
from kvlab.model.decode import Decoder

SMALL = {"budget_tokens": 40, "max_tokens": 8, "sinks": 2, "recent": 16}


class Letters:
    """One token a letter, id = its code point below 128; a chat template of the simplest kind."""

    chat_template = "{{ messages }}"
    eos_token_id = 0

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, text, add_special_tokens=True, **_):
        return {"input_ids": [min(ord(c), 127) for c in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages, **options):
        assert options == {"tokenize": False, "add_generation_prompt": True,
                           "enable_thinking": False}  # fmt: skip
        self.asked.append(messages[0]["content"])
        return f"user:{messages[0]['content']} answer:"


@pytest.fixture
def parts(tiny_model):
    model, letters = tiny_model(), Letters()
    summary = TextSummary(prompt="Tell {words}: {text}", **SMALL)
    return model, letters, PagedCache.for_model(model, summary=summary, tokenizer=letters)


def letters_of(count):
    return torch.tensor([[97 + i % 26 for i in range(count)]])


def test_a_prompt_within_the_budget_is_left_alone(parts):
    model, letters, cache = parts
    got = prefill(model, letters_of(40), cache, chunk_tokens=8).logits
    plain = PagedCache.for_model(model)
    torch.testing.assert_close(got, prefill(model, letters_of(40), plain, chunk_tokens=8).logits)
    assert not letters.asked and not cache.teller.told


def test_a_longer_one_is_summarized_and_rewritten(parts):
    model, letters, cache = parts
    ids = letters_of(120)
    result = prefill(model, ids, cache, chunk_tokens=24)
    teller = cache.teller
    assert result.tokens == 120 and len(teller.told) == len(letters.asked) >= 2
    text = "".join(map(chr, ids[0].tolist()))
    assert letters.asked[0] == f"Tell 5: {text[2:32]}"  # all but sinks and recent, at 48 tokens
    assert letters.asked[1].startswith("Tell 5: \n[Summar")  # the older summary is in the next
    assert teller.tokens[:2] == ids[0, :2].tolist()
    assert teller.tokens[-24:] == ids[0, -24:].tolist()
    assert cache.seen == len(teller.tokens) <= 40 + 24
    # what is in the cache is what prefilling the rewritten prompt gives
    plain = PagedCache.for_model(model)
    rewritten = torch.tensor([teller.tokens])
    want = prefill(model, rewritten, plain, chunk_tokens=256).logits
    torch.testing.assert_close(result.logits, want, rtol=2e-3, atol=2e-3)


def test_the_summary_is_greedy_ends_and_has_no_thoughts(parts, monkeypatch):
    model, letters, cache = parts
    words = iter([*map(ord, "<think>no</think> It rained."), 0])

    def say(self, cache, tokens):
        return torch.nn.functional.one_hot(torch.tensor([[next(words)]]), 128).float()

    monkeypatch.setattr(cache.teller.summary, "max_tokens", 64)
    monkeypatch.setattr(type(cache.teller), "_run", say)
    assert cache.teller.summarize([97, 98]) == "It rained."


def test_decoding_goes_on(parts):
    model, letters, cache = parts
    prefill(model, letters_of(40), cache, chunk_tokens=8)
    decoder = Decoder(model, cache, driver="eager")
    for token in range(4):
        assert decoder.step(torch.tensor([97 + token])).isfinite().all()
    assert cache.seen == len(cache.teller.tokens) and cache.teller.told


def test_a_cache_that_was_reset_starts_over(parts):
    model, _, cache = parts
    prefill(model, letters_of(60), cache, chunk_tokens=20)
    cache.reset()
    prefill(model, letters_of(10), cache, chunk_tokens=20)
    assert cache.teller.tokens == letters_of(10)[0].tolist()


def test_what_would_pass_it_by_is_refused(parts):
    model, _, cache = parts
    with pytest.raises(KvlabError, match="generate"):
        model.generate(letters_of(5), past_key_values=cache, max_new_tokens=2)
    with pytest.raises(BadInput, match="one sequence"):
        prefill(model, letters_of(5).repeat(2, 1), cache)


def test_needs_a_chat_template(tiny_model):
    plain = Letters()
    plain.chat_template = None
    with pytest.raises(BadInput, match="no chat template"):
        PagedCache.for_model(tiny_model(), summary="text", tokenizer=plain)
    with pytest.raises(BadInput, match="needs the tokenizer"):
        PagedCache.for_model(tiny_model(), summary="text")


@pytest.mark.parametrize(
    "arguments", [{"budget_tokens": 10}, {"recent": 0}, {"max_tokens": 0}, {"sinks": -1},
                  {"prompt": "no place for it"}], ids=str,
)  # fmt: skip
def test_senseless_arguments_are_refused(arguments):
    with pytest.raises(BadInput, match="summary"):
        TextSummary(**arguments)
