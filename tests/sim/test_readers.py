"""Formats that give block ids or prefix lengths, by small files made by hand: each one's traps."""

import json

import numpy as np
import pytest
from trace_files import ids, noted, write

from kvlab.core import BadInput
from kvlab.sim import load_trace, load_traces, simulate, write_trace
from kvlab.sim.readers import NAMES, READERS

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
