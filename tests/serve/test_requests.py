"""Requests: seeded, sharing what their trace shares, in real text where they come from books."""

from __future__ import annotations

import numpy as np
import pytest

from kvlab.blocks import chained_hashes
from kvlab.core import BadInput
from kvlab.eval.data import Books
from kvlab.model.load import ReferenceModel
from kvlab.serve import (
    BookChats,
    Request,
    TraceRequests,
    as_trace,
    several,
    with_cancellations,
    with_rate,
)
from kvlab.serve.requests import check_requests
from kvlab.sim import load_trace, simulate


@pytest.fixture(scope="module")
def trace():
    return load_trace("conversation")


def test_equal_blocks_become_equal_tokens(trace):
    made = TraceRequests(trace, count=60, block_tokens=8).make(None, 8192)
    ids = list(trace.requests())
    for i, j in ((0, 1), (5, 40), (20, 21)):
        shared = sum(1 for _ in _while_equal(ids[i], ids[j]))
        a, b = made[i].prompt, made[j].prompt
        both = min(len(a), len(b))
        same = int(np.argmin(np.append(a[:both] == b[:both], False)))
        assert same >= min(8 * shared, both) and same < 8 * (shared + 1)
    assert all(r.prompt.min() > 0 and r.prompt.max() < 8192 for r in made)


def _while_equal(a, b):
    for x, y in zip(a, b):
        if x != y:
            return
        yield x


def test_lengths_scale(trace):
    made = TraceRequests(trace, count=20, block_tokens=32, skip=3).make(None, 8192)
    want = np.maximum(1, np.round(trace.input_tokens[3:23] / 16))
    assert [len(r.prompt) for r in made] == want.tolist()
    assert [r.number for r in made] == list(range(20))


def test_hits_of_the_requests_are_those_of_the_trace(trace):
    """Whole blocks only, since a partial block is not shared live."""
    made = TraceRequests(trace, count=400, block_tokens=4).make(None, 8192)
    names = [chained_hashes("x", 4, r.prompt) for r in made]
    ours = simulate(as_trace(made, names, 4), capacity_blocks=10**6)
    head = trace.select(np.arange(len(trace)) < 400)
    theirs = simulate(head, capacity_blocks=10**6, partial_blocks="miss")
    assert ours.block_hits == theirs.block_hits


@pytest.mark.parametrize("settings", [{"count": 0}, {"block_tokens": 0}, {"skip": -1},
                                      {"skip": 10**6}])  # fmt: skip
def test_senseless_settings_are_refused(trace, settings):
    with pytest.raises(BadInput, match=f"requests.{next(iter(settings))}"):
        TraceRequests(trace, **settings).make(None, 8192)


def test_one_trace_at_a_time(trace):
    assert TraceRequests([trace]).trace is trace
    with pytest.raises(BadInput, match="name one trace"):
        TraceRequests([trace, trace])
    assert several([1, 2]) == [1, 2]


@pytest.fixture(scope="module")
def tokenizer():
    return ReferenceModel().load("cpu").tokenizer


def chats(tokenizer, **settings):
    return BookChats(Books(), **{"count": 40, "passages": 5, "passage_tokens": 96} | settings).make(
        tokenizer, 8192
    )


def test_book_chats_ask_about_their_passage(tokenizer):
    made = chats(tokenizer)
    texts = [tokenizer.decode(r.prompt) for r in made]
    assert all("Question: " in t and t.rstrip().endswith("Answer:") for t in texts)
    assert len({t[:100] for t in texts}) > 2
    longer = [t for t in texts if t.count("Question: ") > 1]
    assert longer and any(other in t and other != t for t in longer for other in texts)
    again = chats(tokenizer)
    assert all((a.prompt == b.prompt).all() for a, b in zip(made, again))
    assert texts != [tokenizer.decode(r.prompt) for r in chats(tokenizer, seed=1)]


def test_too_few_words_are_refused(tokenizer):
    with pytest.raises(BadInput, match="requests.turns"):
        BookChats(Books(), turns=0)


def test_rates_and_departures(trace):
    made = TraceRequests(trace, count=100, block_tokens=4, skip=500).make(None, 8192)
    quick = with_rate(made, 50.0)
    assert quick[0].arrival_ms == 0 and quick[-1].arrival_ms == pytest.approx(2000)
    leaving = with_cancellations(made, 0.5, seed=3)
    gone = [r for r in leaving if r.cancel_after is not None]
    assert 30 < len(gone) < 70
    assert all(-1 <= r.cancel_after < r.output_tokens for r in gone)


@pytest.mark.parametrize(("field", "value"), [
    ("prompt", [1, 2]), ("prompt", np.ones(3)), ("prompt", np.ones((1, 3), int)),
    ("output_tokens", "3"), ("output_tokens", 1.5), ("cancel_after", True), ("arrival_ms", "now"),
    ("arrival_ms", float("nan")),
])  # fmt: skip
def test_requests_of_the_wrong_kind(field, value):
    request = Request(7, 0.0, np.arange(3), 2)
    check_requests([request])
    with pytest.raises(BadInput, match=f"requests={field}=.* of number 7"):
        check_requests([request._replace(**{field: value})])
