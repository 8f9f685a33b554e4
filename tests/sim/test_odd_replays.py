"""Replays and traces asked for with what is none: one sentence, nothing built and nothing guessed.
"""

from __future__ import annotations

import inspect
import json
from math import inf, nan

import pytest

from kvlab.core import BadInput, KvlabError
from kvlab.sim import CostModel, Definitions, Host, Sessions, load_trace, simulate, workloads

ODD = ("x", True, nan, inf, None, 0, -1, 1.5, 10**30, [], {}, object())
REPLAYS = [
    ("capacity_blocks", (True, 1.5, "10", nan, None, 0, -1)), ("host", (0, "x", True)),
    ("service", ("x", 3)), ("sessions", ("x",)), ("prefix", ("no", 0)), ("compiled", ("yes", 1)),
    ("policy", (3, None)), ("partial_blocks", ("x", None)), ("window_seconds", ("x", nan)),
    ("events", ("x",)),
]  # fmt: skip


@pytest.mark.parametrize(("key", "values"), REPLAYS, ids=[key for key, _ in REPLAYS])
def test_replays(key, values):
    """`prefix="no"` replayed with prefixes, `host=0` was an AttributeError."""
    trace = workloads.system_prompts(4, block_size=4)
    for value in values:
        with pytest.raises(BadInput, match=f"{key}="):
            simulate(trace, **{key: value})


@pytest.mark.parametrize("made", [Host, CostModel, Sessions, Definitions])
def test_parts_of_a_replay(made):
    least = {"capacity_blocks": 3} if made is Host else {}
    for key in inspect.signature(made).parameters:
        for value in ODD:
            try:
                made(**least | {key: value})
            except KvlabError as error:
                assert len(str(error)) < 300


def test_compiled_replays_have_room_or_say_so():
    """32 TiB of links were asked for; beyond 2**31 they could not have told blocks apart."""
    pytest.importorskip("numba")
    trace = workloads.system_prompts(4, block_size=4)
    for given in ({"capacity_blocks": 2**31}, {"host": Host(2**40)}):
        with pytest.raises(BadInput, match="more than compiled replay has room for"):
            simulate(trace, compiled=True, **given)
        simulate(trace, **given)


@pytest.mark.parametrize("path", [3, None, [], b"x", True])
def test_paths(path):
    with pytest.raises(BadInput, match="trace.path="):
        load_trace(path)


def test_files_nested_without_end_and_times_beyond_a_double(tmp_path):
    row = {"timestamp": 1e40, "input_length": 2, "output_length": 1, "hash_ids": [1]}
    for name, text, told in (("deep", "[" * 100_000, "not a whole JSON file"),
                             ("late", json.dumps(row) + "\n", r"below 2\*\*53")):  # fmt: skip
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        with pytest.raises(BadInput, match=told):
            load_trace(path)
    path.write_text(json.dumps(row | {"timestamp": 1}) + "\n" + "[" * 100_000 + "\n")
    with pytest.raises(BadInput, match="late.jsonl:2: not a line of JSON"):
        load_trace(path)
