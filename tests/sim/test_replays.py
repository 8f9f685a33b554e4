"""A replay gives to the block what it gave when it was recorded."""

import json
from pathlib import Path

import pytest
from replays import RANKED, cases, digest, traces

from kvlab.core import BadInput
from kvlab.policy import asked, by_name, names

RECORDED = json.loads(Path(__file__).with_name("replays.json").read_text())
CASES = {name: (trace, given) for name, trace, given in cases()}


def test_what_was_recorded_is_what_is_replayed():
    assert RECORDED.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_recorded_replay(name):
    assert digest(*CASES[name]) == RECORDED[name]


@pytest.mark.parametrize("policy", [n for n in names() if asked(n).scored and n != RANKED])
def test_no_trace_has_scores(policy):
    try:
        by_name(policy)
    except BadInput as error:
        pytest.skip(f"{policy} is not made by its name alone: {error}")
    given = {"policy": policy, "capacity_blocks": 24}
    assert digest(traces()["sessions"], given) == RECORDED[f"sessions {RANKED} 24"]


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith((" 24", " partial"))])
def test_a_recorded_replay_is_the_same(name):
    """With somebody who hears each verb of the ledger, none is left out."""
    trace, given = CASES[name]
    assert digest(trace, given | {"events": lambda event: None}) == RECORDED[name]
