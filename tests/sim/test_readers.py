"""Every trace format, by small files made by hand: what is read, and each format's traps."""

import json

import numpy as np
import pytest

from kvlab.core import BadInput
from kvlab.sim import load_trace, load_traces, simulate, write_trace
from kvlab.sim.readers import NAMES, READERS
from kvlab.sim.readers.text import rendered


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def ids(trace):
    return list(trace.requests())


def noted(trace, words):
    return any(words in sentence for sentence in trace.notes)


# ---------------------------------------------------------------- Mooncake and its delta form


def test_mooncake_keeps_sessions_and_partial_ends(tmp_path):
    row = {"timestamp": 5, "input_length": 600, "output_length": 2, "hash_ids": [3, 4]}
    trace = load_trace(write(tmp_path / "m.jsonl", row | {"session_id": "a"}, row))
    assert (trace.format, trace.block_size, trace.whole_blocks) == ("mooncake", 512, False)
    assert trace.columns["session"].tolist() == [0, -1] and trace.partial.tolist() == [True, True]
    assert trace.block_tokens.tolist() == [512, 88, 512, 88]


def test_mooncake_delta_adds_up_a_session_with_its_answers(tmp_path):
    first = {"session_id": "s", "timestamp": 10, "input_length": 4, "output_length": 2}
    second = {"session_id": "s", "delay": 5, "input_length": 2, "output_length": 1}
    other = first | {"session_id": "t", "timestamp": 12}
    path = write(
        tmp_path / "d.jsonl", first | {"hash_ids": [1]}, second | {"hash_ids": [2]},
        other | {"hash_ids": [1]},
    )  # fmt: skip
    trace = load_trace(path, 4, "mooncake-delta")
    assert trace.input_tokens.tolist() == [4, 4, 8]  # 4 + 2 answered + 2
    assert trace.arrival_ms.tolist() == [10, 12, 15]
    whole, again, grown = ids(trace)
    assert whole == again and grown[0] == whole[0] and grown[1] not in whole
    assert trace.columns["session"].tolist() == [0, 1, 0] and noted(trace, "need no time")


def test_a_delta_file_read_as_mooncake_is_noticed(tmp_path):
    rows = [
        {"session_id": "s", "timestamp": 0, "input_length": 4, "output_length": 2, "hash_ids": [1]},
        {"session_id": "s", "delay": 5, "input_length": 2, "output_length": 1, "hash_ids": [2]},
    ]
    with pytest.raises(BadInput, match="trace.format=mooncake-delta"):
        load_trace(write(tmp_path / "d.jsonl", *rows), 4)


# ---------------------------------------------------------------- Qwen-Bailian


def bailian(chat, parent, at, tokens, hashes, **more):
    row = {"chat_id": chat, "parent_chat_id": parent, "timestamp": at, "input_length": tokens}
    return row | {"output_length": 3, "type": "text", "turn": 1, "hash_ids": hashes} | more


def test_bailian_has_seconds_blocks_of_16_chats_and_no_hash_of_a_partial_end(tmp_path):
    path = write(
        tmp_path / "b.jsonl", bailian(7, -1, 0.5, 32, [1, 2]), bailian(8, 7, 1.5, 40, [1, 2, 9]),
        bailian(9, 8, 2.0, 50, [1, 2, 3, 9]), bailian(5, 4, 3.0, 8, [6]),
    )  # fmt: skip
    trace = load_trace(path)
    assert (trace.format, trace.block_size, trace.whole_blocks) == ("bailian", 16, True)
    assert trace.arrival_ms.tolist() == [500, 1500, 2000, 3000]
    assert ids(trace) == [[1, 2], [1, 2], [1, 2, 3], []]  # 9 covers padding or an answer
    assert trace.columns["session"].tolist() == [0, 0, 0, 3]
    assert noted(trace, "partial last blocks") and noted(trace, "begin a session")
    assert simulate(trace, "lru", 10).block_hits == 4


# ---------------------------------------------------------------- Weka


def asked(t, hashes, model="big", tokens=None, **more):
    row = {"t": t, "type": "n", "model": model, "in": tokens or 64 * len(hashes) + 5, "out": 9}
    return row | {"hash_ids": hashes, "think_time": 2.0, "stop": "end_turn"} | more


def weka(*requests, **more):
    head = {"id": "x", "models": ["big"], "block_size": 64, "hash_id_scope": "local"}
    return head | {"requests": list(requests)} | more


def agent(t, *requests):
    return {"t": t, "type": "subagent", "agent_id": "a", "requests": list(requests)}


def test_weka_ids_are_local_to_a_file(tmp_path):
    folder = tmp_path / "w"
    write(folder / "one.json", weka(asked(0.0, [1, 2]), asked(9.0, [1, 2, 3])))
    write(folder / "two.json", weka(asked(0.0, [1, 2]), asked(4.0, [1, 5])))
    trace = load_trace(folder)
    assert (trace.format, trace.block_size, trace.whole_blocks) == ("weka", 64, True)
    assert trace.arrival_ms.tolist() == [0, 0, 4000, 9000]
    one, two, two_again, one_again = ids(trace)
    assert not set(one) & set(two) and one_again[:2] == one and two_again[0] == two[0]
    assert trace.columns["session"].tolist() == [0, 1, 1, 0]
    assert trace.columns["think_ms"].tolist() == [2000.0] * 4 and noted(trace, "begin at 0")
    assert trace.tokens == 4 * 5 + 64 * 9


def test_weka_subagents_are_conversations_that_share_their_session_s_ids(tmp_path):
    helper = agent(10.0, asked(0.0, [1, 7]), asked(3.0, [1, 7, 8]))
    path = write(tmp_path / "s.json", weka(asked(0.0, [1, 2]), helper, asked(20.0, [1, 2, 3])))
    trace = load_trace(path)
    assert trace.arrival_ms.tolist() == [0, 10_000, 13_000, 20_000]
    assert trace.columns["session"].tolist() == [0, 1, 1, 0]
    assert np.count_nonzero(trace.previous >= 0) == 1 + 2 + 2
    assert noted(trace, "from the start of the sub-agent")
    absolute = agent(10.0, asked(10.0, [1, 7]), asked(13.0, [1, 7, 8]))
    trace = load_trace(write(tmp_path / "a.json", weka(asked(0.0, [1, 2]), absolute)))
    assert trace.arrival_ms.tolist() == [0, 10_000, 13_000]


def test_weka_models_do_not_share_a_cache(tmp_path):
    path = write(tmp_path / "s.json", weka(asked(0.0, [1, 2]), asked(1.0, [1, 2], "small")))
    trace = load_trace(path)
    assert not (trace.previous >= 0).any() and noted(trace, "2 ids are asked for by two models")


def test_weka_drives_a_load_whose_prompts_end_in_text_of_their_own(tmp_path):
    from kvlab.serve.requests import TraceRequests

    path = write(tmp_path / "s.json", weka(asked(0.0, [1], tokens=96), asked(1.0, [1], tokens=96)))
    one, two = TraceRequests(load_trace(path), count=2).make(None, 1000)
    assert len(one.prompt) == len(two.prompt) == 24
    assert (one.prompt[:16] == two.prompt[:16]).all() and (one.prompt[16:] != two.prompt[16:]).any()


def test_weka_a_session_a_line_or_spread_over_lines(tmp_path):
    sessions = weka(asked(0.0, [1])), weka(asked(0.0, [1]), asked(1.0, []))
    lines = load_trace(write(tmp_path / "s.jsonl", *sessions))
    assert ids(lines) == [[1], [3], []] or len({i for r in ids(lines) for i in r}) == 2
    pretty = tmp_path / "p.json"
    pretty.write_text(json.dumps(sessions[1], indent=1))
    trace = load_trace(pretty)
    assert len(trace) == 2 and trace.format == "weka"
    for policy in ("lru", "belady"):
        assert simulate(trace, policy, 4).requests == 2  # one of them has no whole block


# ---------------------------------------------------------------- TraceLab


def tracelab(session, index, second, prefix, new, **more):
    event = {"event_type": "user_message", "timestamp": f"2026-01-01T00:00:{second:02}Z"}
    row = {"session_id": session, "round_index": index, "prefix_tokens": prefix}
    row |= {"newly_append_tokens": new, "input_tokens_total": prefix + new, "output_tokens": 7}
    return row | {"timing_events": [event]} | more


def test_tracelab_ids_follow_from_prefix_lengths(tmp_path):
    path = write(
        tmp_path / "t.jsonl", tracelab("a", 0, 1, 64, 200), tracelab("a", 2, 9, 130, 10),
        tracelab("a", 1, 5, 264, 60), tracelab("b", 0, 3, 0, 64),
        tracelab("c", 0, 4, 0, 64, timing_events=[]),
    )  # fmt: skip
    trace = load_trace(path)
    assert (trace.format, trace.block_size, trace.whole_blocks) == ("tracelab", 64, True)
    assert trace.arrival_ms.tolist() == [0, 2000, 4000, 8000]
    first, other, grown, compacted = ids(trace)
    assert (len(first), len(other), grown[:4], len(grown)) == (4, 1, first, 5)
    assert compacted == grown[:2] and trace.columns["cached_tokens"].tolist() == [64, 0, 264, 130]
    for words in ("counts as new text", "shared by sessions", "left out"):
        assert noted(trace, words)


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


# ---------------------------------------------------------------- all of them


def test_a_format_can_be_named_and_every_name_is_one(tmp_path):
    assert len(set(NAMES)) == len(READERS) == 12
    row = {"timestamp": 0, "input_length": 4, "output_length": 2, "hash_ids": [1]}
    path = write(tmp_path / "m.jsonl", row)
    assert load_traces(str(path), 4, format="mooncake")[0].accesses == 1
    with pytest.raises(BadInput, match="known: mooncake, "):
        load_trace(path, format="mooncakes")


def test_whole_blocks_survive_writing_and_plain_files_suit_other_tools(tmp_path):
    source = load_trace(write(tmp_path / "w.json", weka(asked(0.0, [1, 2]), asked(9.0, [1, 2, 3]))))
    back = load_trace(write_trace(source, tmp_path / "own.jsonl"))
    assert ids(back) == ids(source) and back.whole_blocks and back.block_size == 64
    assert back.columns["session"].tolist() == [0, 0]
    plain = write_trace(source, tmp_path / "plain.jsonl", plain=True)
    assert "block_size" not in plain.read_text()
    other = load_trace(plain, 64)
    assert [len(i) for i in ids(other)] == [3, 4] and not other.whole_blocks
    assert np.count_nonzero(other.previous >= 0) == np.count_nonzero(source.previous >= 0) == 2


def test_coarser_blocks_of_whole_ones_are_whole_ones(tmp_path):
    path = write(tmp_path / "w.json", weka(asked(0.0, [1, 2, 3]), asked(9.0, [1, 2, 3, 4])))
    twice = load_trace(path).coarser(2)
    assert ids(twice) == [[0], [0, 1]] and twice.block_tokens.tolist() == [128] * 3
