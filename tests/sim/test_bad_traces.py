"""Bad traces: a table of what is wrong with a file, and the one sentence that says so."""

import json
import lzma

import pytest

from kvlab.core import BadInput
from kvlab.sim import load_trace

GOOD = {"timestamp": 5, "input_length": 8, "output_length": 1, "hash_ids": [1, 2]}
CHAT = GOOD | {"chat_id": 1, "parent_chat_id": -1, "input_length": 32}
WEKA = {"block_size": 64, "hash_id_scope": "local", "requests": []}
CALL = {"t": 0, "model": "m", "in": 64, "out": 1, "hash_ids": [1]}
ROUND = {
    "session_id": "s", "timing_events": [{"timestamp": "2026-01-01T00:00:00"}],
    "input_tokens_total": 9, "prefix_tokens": 4, "newly_append_tokens": 5, "output_tokens": 1,
}  # fmt: skip
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:07cedc9e\nsize 1\n"


def text(*rows):
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


# what is wrong: (text of the file, its suffix, block size, where, what is said)
TABLE = {
    "no requests": ("", ".jsonl", 4, "", "no requests in it"),
    "blank lines only": ("\n\n", ".jsonl", 4, "", "no requests in it"),
    "header only": (text({"block_size": 4}), ".jsonl", None, "", "no requests in it"),
    "unsorted": (text(GOOD, GOOD | {"timestamp": 4}), ".jsonl", 4, ":2", "sort the trace by time"),
    "negative time": (text(GOOD, GOOD | {"timestamp": -1}), ".jsonl", 4, ":2", "0, not -1"),
    "no time": (text(GOOD | {"timestamp": None}), ".jsonl", 4, ":1", "at least 0, not None"),
    "negative output": (text(GOOD | {"output_length": -1}), ".jsonl", 4, ":1", "not -1"),
    "fraction of a token": (text(GOOD | {"input_length": 7.5}), ".jsonl", 4, ":1", "not 7.5"),
    "ids that are texts": (text(GOOD | {"hash_ids": ["a", 2]}), ".jsonl", 4, ":1", "whole numbers"),
    "ids repeated": (text(GOOD | {"hash_ids": [2, 2]}), ".jsonl", 4, ":1", "comes twice"),
    "wrong block size": (text(GOOD), ".jsonl", 512, ":1", "is the block size of the trace another"),
    "two block sizes": (text({"block_size": 4}, GOOD), ".jsonl", 8, "", "the header of"),
    "torn last line": (text(GOOD, GOOD)[:-9], ".jsonl", 4, ":2", "the last line is cut off"),
    "broken line": (text(GOOD, "{a", GOOD), ".jsonl", 4, ":2", "not a line of JSON"),
    "mixed formats": (text(GOOD, CHAT), ".jsonl", 4, ":2", "a line of bailian in a mooncake trace"),
    "a field less": (text(GOOD, {"timestamp": 9}), ".jsonl", 4, ":2", "missing input_length"),
    "unknown format": (text({"a": 1, "b": 2}), ".jsonl", 4, "", "no format known by these fields"),
    "not a trace": ("hello\n", ".txt", None, "", "no format known by these fields"),
    "pointer": (POINTER, ".jsonl", 16, "", "a Git LFS pointer"),
    "seconds as text": (text(CHAT | {"timestamp": "9"}), ".jsonl", 16, ":1", "must be seconds"),
    "session cut off": ("[" + json.dumps(WEKA)[:-3], ".json", None, "", "not a whole JSON file"),
    "ids of all files": (
        text(WEKA | {"hash_id_scope": "global", "requests": [CALL]}), ".json", None, "",
        "only local is",
    ),
    "session without requests": (text(WEKA), ".json", None, "", "no requests in it"),
    "request without ids": (
        text(WEKA | {"requests": [{"t": 0, "model": "m"}]}), ".json", None, "request 0",
        "missing in, out, hash_ids",
    ),
    "time before the session": (
        text(WEKA | {"requests": [CALL | {"t": -1}]}), ".json", None, "request 0", "at least 0",
    ),
    "id for a partial block": (
        text(WEKA | {"requests": [CALL | {"in": 65, "hash_ids": [1, 2]}]}), ".json", None,
        "request 0", "are 1 whole ones",
    ),
    "lengths that do not add up": (
        text(ROUND | {"prefix_tokens": 5}), ".jsonl", None, ":1", "is not prefix 5 + newly",
    ),
    "a date that is none": (
        text(ROUND | {"timing_events": [{"timestamp": "soon"}]}), ".jsonl", None, ":1", "a date",
    ),
    "cells missing": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,5\n", ".csv", None, ":2",
        "2 cells under 3 names",
    ),
    "cells of words": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,many,5\n", ".csv", None, ":2",
        "must be a number, not 'many'",
    ),
    "messages missing": (
        text({"session_id": 1, "input": 5, "output_length": 1}), ".jsonl", None, ":1",
        "a list of messages",
    ),
    "turns missing": (text({"messages": 5}), ".jsonl", None, ":1", "no turns under"),
    "nobody speaks": (text({"messages": [{}]}), ".jsonl", None, ":1", "a turn needs from and"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", TABLE)
def test_one_sentence_says_what_is_wrong_and_where(tmp_path, wrong):
    content, suffix, block_size, where, said = TABLE[wrong]
    path = tmp_path / f"bad{suffix}"
    path.write_text(content)
    with pytest.raises(BadInput) as error:
        load_trace(path, block_size)
    told = str(error.value)
    assert said in told and where in told and f"bad{suffix}" in told and "\n" not in told


TURNS = {"num_turns": 1, "input_prompt_length": 9, "final_assistant_response_length": 5}
TURNS |= {"assistant_response_length": [1], "tool_call_output_length": [3]}
SOUND = {
    "mooncake": GOOD,
    "mooncake-delta": GOOD | {"session_id": "a"},
    "agentic-mooncake": GOOD | {"request_id": "a", "wait_for": [], "session_id": "a"},
    "applied-compute": TURNS | {"tool_call_latency": [0.5]},
    "bailian": CHAT | {"hash_ids": list(range(8))},
    "weka": WEKA | {"requests": [CALL, {"t": 1, "type": "subagent", "requests": [CALL]}]},
    "tracelab": ROUND,
    "lmcache": {"session_id": 1, "input": [{"role": "user", "content": "a"}], "output_length": 1},
    "sharegpt": {"messages": [{"role": "user", "content": "a"}, {"role": "gpt", "content": "b"}]},
}


def broken(value):
    """Copies of a value with one part of it replaced by something of another kind, or gone."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: other} for other in broken(part))
    elif isinstance(value, list) and value:
        yield from ([other, *value[1:]] for other in broken(value[0]))
        yield from ([*value[:-1], other] for other in broken(value[-1]))
    yield from (None, "x", -1, 1.5, [], {}, [None], [[1], [2, 3]], True, 2**70, "")


@pytest.mark.parametrize("format", SOUND)
def test_any_broken_part_is_read_or_refused(tmp_path, format):
    size = None if format == "weka" else 4
    suffix = ".json" if format == "weka" else ".jsonl"
    path, refused = tmp_path / f"t{suffix}", 0
    path.write_text(text(SOUND[format]))
    assert len(load_trace(path, size, format)) >= 1
    for row in broken(SOUND[format]):
        path.write_text(text(json.dumps(row)))
        try:
            load_trace(path, size, format)
        except BadInput as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


def test_files_that_cannot_be_unpacked_or_listed(tmp_path):
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(text(GOOD).encode() * 99)[:60])
    (tmp_path / "fake.parquet").write_bytes(b"PAR1 not at all")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("cut.jsonl.xz", "cannot be read"),
        ("fake.parquet", "cannot be read"),
        ("empty", "neither Parquet files nor JSON sessions"),
    ):
        with pytest.raises(BadInput, match=said):
            load_trace(tmp_path / name)
