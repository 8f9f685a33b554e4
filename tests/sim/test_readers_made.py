"""Formats whose ids are made (text, sessions) or are none, by small files made by hand."""

import json

import numpy as np
import pytest
from trace_files import ids, noted, write

from kvlab.core import BadInput
from kvlab.sim import load_trace, simulate, write_trace
from kvlab.sim.readers.text import rendered

# ---------------------------------------------------------------- text


def say(role, text):
    return {"role": role, "content": text}


def talk(session, gap, *messages):
    return {"session_id": session, "input": list(messages), "output_length": 4, "pre_gap": gap}


SYSTEM = say("system", "You are a patient tool. " * 20)
HELLO = say("user", "Read the file, please.")
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"name": "read", "n": 1}]}


def test_lmcache_text_is_tokenized_and_hashed_by_prefix(tmp_path):
    path = write(
        tmp_path / "l.jsonl", talk("a", 0, SYSTEM, HELLO),
        talk("b", 1.5, SYSTEM, say("user", "Hi")),
        talk("a", 2.0, SYSTEM, HELLO, CALLED, say("tool", "text of the file " * 30)),
    )  # fmt: skip
    trace = load_trace(path)
    assert (trace.format, trace.block_size, trace.whole_blocks) == ("lmcache", 16, True)
    first, other, grown = ids(trace)
    shared = sum(a == b for a, b in zip(first, other))
    assert shared >= 4 and grown[: len(first)] == first and len(grown) > len(first)
    assert trace.arrival_ms.tolist() == [0, 1500, 2000]
    assert noted(trace, "bundled tokenizer") and noted(trace, "need no time")
    trace.check_prefix_chained()
    assert rendered("assistant", None, [1]) == "<|assistant|>\n[1]\n"
    assert rendered("user", [{"type": "text", "text": "a"}]) == "<|user|>\na\n"


def test_lmcache_as_parquet_is_the_same(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [talk("a", 0.5, SYSTEM, HELLO), talk("a", 2.0, SYSTEM, HELLO, HELLO)]
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "p").mkdir()
    parquet.write_table(table, tmp_path / "p" / "0.parquet")
    one = load_trace(tmp_path / "p")
    two = load_trace(write(tmp_path / "l.jsonl", *rows))
    assert ids(one) == ids(two) and one.format == "lmcache"


def test_a_tokenizer_can_be_named_where_there_is_text(tmp_path):
    path = write(tmp_path / "l.jsonl", talk("a", 0, SYSTEM))
    with pytest.raises(BadInput, match="no such tokenizer.json"):
        load_trace(path, tokenizer=str(tmp_path))
    with pytest.raises(BadInput, match="mooncake traces hold no text"):
        load_trace("synthetic", tokenizer="x")


def test_sharegpt_each_answer_is_a_request(tmp_path):
    turns = [{"from": "gpt", "value": "Welcome"}, {"from": "human", "value": "long " * 40}]
    turns += [{"from": "gpt", "value": "yes"}, {"from": "human", "value": "more " * 40}]
    turns += [{"from": "gpt", "value": "no"}]
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"id": "1", "conversations": turns}]))
    trace = load_trace(path)
    first, second = ids(trace)
    assert trace.format == "sharegpt" and second[: len(first)] == first
    assert noted(trace, "not requests") and noted(trace, "no arrivals")
    wild = {"conversation": [say("user", "long " * 40), say("assistant", "yes")]}
    trace = load_trace(write(tmp_path / "w.jsonl", wild, wild))
    assert ids(trace)[0] == ids(trace)[1] and trace.columns["session"].tolist() == [0, 1]


# ---------------------------------------------------------------- Baseten


def baseten(path, *rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def completion(at, tokens, hashes, cached, **more):
    row = {"timestamp_start_unix_ms": at, "input_tokens": tokens, "output_tokens": 3}
    row |= {"total_hashes": hashes, "cached_tokens_reference": cached, "block_size": 16}
    return row | {"model_name": "m", "prompt": "text", "provided_session_id": "s"} | more


def test_baseten_has_the_server_s_own_count(tmp_path):
    big = 2**63 - 5
    path = baseten(
        tmp_path / "b.parquet", completion(1_700_000_000_500, 40, [big, 3], 16),
        completion(1_700_000_000_000, 33, [big, 4], 0),
        completion(1_700_000_000_700, 32, [big, 3], 32),
        completion(1_700_000_000_800, 32, [big, 3], 0, model_name="other"),
    )  # fmt: skip
    trace = load_trace(path)
    assert (trace.format, trace.block_size, trace.whole_blocks) == ("baseten", 16, True)
    assert trace.arrival_ms.tolist() == [0, 500, 700, 800]
    assert trace.columns["cached_tokens"].tolist() == [0, 16, 32, 0]
    assert np.count_nonzero(trace.previous >= 0) == 3  # another model shares nothing
    with pytest.raises(BadInput, match="no total_hashes"):
        load_trace(baseten(tmp_path / "n.parquet", completion(0, 40, [], 0)))
    mixed = completion(0, 40, [1, 2], 0), completion(1, 40, [1], 0, block_size=32)
    with pytest.raises(BadInput, match="several block sizes"):
        load_trace(baseten(tmp_path / "m.parquet", *mixed))


# ---------------------------------------------------------------- Dynamo's agentic forms


def node(name, hashes, **more):
    row = {"request_id": name, "session_id": "s", "hash_ids": hashes, "output_length": 1}
    return row | {"input_length": 4 * len(hashes)} | more


def test_agentic_requests_come_after_those_they_wait_for(tmp_path):
    path = write(
        tmp_path / "a.jsonl", node("join", [1, 4], wait_for=["b", "c"], tool_wait_ms=7),
        node("a", [1], timestamp=100), node("b", [1, 2], wait_for=["a"], delay=5),
        node("c", [1, 3], wait_for=["a"], delay=20),
    )  # fmt: skip
    trace = load_trace(path, 4)
    assert trace.format == "agentic-mooncake"
    assert trace.arrival_ms.tolist() == [100, 105, 120, 127]
    assert ids(trace) == [[1], [1, 2], [1, 3], [1, 4]]
    assert np.nan_to_num(trace.columns["think_ms"], nan=-1).tolist() == [-1, 5, 20, 7]


@pytest.mark.parametrize(
    "rows, complaint",
    [
        ([node("a", [1], wait_for=["z"])], "waits for 'z', which is not in the file"),
        ([node("a", [1], wait_for=["b"]), node("b", [1], wait_for=["a"])], "which waits for it"),
        ([node("a", [1])], "needs a timestamp"),
        ([node("a", [1], timestamp=0), node("a", [1], timestamp=0)], "comes a second time"),
        ([node("a", [1], timestamp=0), node("b", [1], wait_for=["a"], delay=-1)], "at least 0"),
    ],
)
def test_agentic_traces_that_cannot_run_are_refused(tmp_path, rows, complaint):
    with pytest.raises(BadInput, match=complaint):
        load_trace(write(tmp_path / "a.jsonl", *rows), 4)


def test_applied_compute_sessions_grow_by_answers_and_results(tmp_path):
    session = {
        "num_turns": 2, "input_prompt_length": 100, "assistant_response_length": [10, 20],
        "tool_call_output_length": [30, 40], "tool_call_latency": [1.5, 0.5],
        "final_assistant_response_length": 5,
    }  # fmt: skip
    trace = load_trace(write(tmp_path / "t.jsonl", session, session), 10)
    assert trace.input_tokens.tolist() == [100, 100, 140, 140, 200, 200]
    assert trace.output_tokens.tolist() == [10, 10, 20, 20, 5, 5]
    assert trace.arrival_ms.tolist() == [0, 0, 1500, 1500, 2000, 2000]
    assert np.count_nonzero(trace.previous >= 0) == 2 * (10 + 14)  # nothing between sessions
    with pytest.raises(BadInput, match="num_turns numbers"):
        load_trace(write(tmp_path / "x.jsonl", session | {"num_turns": 3}))


# ---------------------------------------------------------------- lengths and arrivals only

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,4808,10\n" \
    "2023-11-16 18:15:50.9951690,3180,8\n"  # fmt: skip
BURST = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens," \
    "Log Type\n5,1,2,GPT-4,472,18,490,API log\n9,1,2,GPT-4,100,0,100,API log\n" \
    "45,2,1,ChatGPT,1087.0,230,1317,API log\n"  # fmt: skip


@pytest.mark.parametrize(
    "name, text, arrivals, lengths",
    [("azure", AZURE, [0, 4314.579], [4808, 3180]), ("burstgpt", BURST, [0, 40_000], [472, 1087])],
)
def test_lengths_drive_a_load_but_give_no_hit_rates(tmp_path, name, text, arrivals, lengths):
    from kvlab.serve.requests import TraceRequests

    (tmp_path / "x.csv").write_text(text)
    trace = load_trace(tmp_path / "x.csv")
    assert (trace.format, trace.shares) == (name, False)
    assert trace.arrival_ms == pytest.approx(arrivals) and trace.input_tokens.tolist() == lengths
    made = TraceRequests(trace, count=2).make(None, 100)
    assert [len(r.prompt) for r in made] == [round(n / 4) for n in lengths]
    for policy, how in (("lru", {}), ("lru", {"prefix": False}), ("belady", {})):
        with pytest.raises(BadInput, match="no prefixes"):
            simulate(trace, policy, 100, **how)
    with pytest.raises(BadInput, match="no prefixes"):
        write_trace(trace, tmp_path / "t.jsonl")
