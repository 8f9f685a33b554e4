"""Reading and writing traces: every format, every complaint with its line."""

import gzip
import json
import lzma
import tracemalloc

import numpy as np
import pytest

from kvlab.core import BadInput
from kvlab.sim import TraceStream, load_trace, load_traces, write_trace

GOOD = {"timestamp": 0, "input_length": 900, "output_length": 5, "hash_ids": [7, 9]}


def lines(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_bundled_traces_are_the_published_ones(conversation, synthetic):
    assert (len(conversation), conversation.accesses) == (12_031, 288_500)
    assert (len(synthetic), synthetic.accesses) == (3_993, 121_877)
    assert conversation.dense[1] == 182_790 and synthetic.dense[1] == 43_924
    assert np.count_nonzero(conversation.previous >= 0) == 105_710
    for trace in (conversation, synthetic):
        assert trace.block_size == 512 and trace.block_tokens.sum() == trace.tokens
        trace.check_prefix_chained()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".jsonl.gz"])
def test_written_traces_read_back_the_same(tmp_path, trie, suffix):
    trace = trie(1)
    back = load_trace(write_trace(trace, tmp_path / f"t{suffix}"))
    assert back.block_size == trace.block_size == 4
    for name in ("arrival_ms", "input_tokens", "output_tokens", "first", "ids"):
        assert np.array_equal(getattr(back, name), getattr(trace, name)), name


def test_a_stream_is_the_trace_in_pieces(tmp_path, trie):
    trace = trie(2, requests=50)
    stream = TraceStream(write_trace(trace, tmp_path / "t.jsonl"), piece=10)
    pieces = list(stream.pieces())
    assert len(pieces) > 5
    assert np.array_equal(np.concatenate([p.ids for p in pieces]), trace.ids)
    assert [p.accesses for p in pieces] == [p.accesses for p in stream.pieces()]  # opens anew


def test_block_size_from_header_argument_and_default(tmp_path):
    plain = lines(tmp_path / "a.jsonl", GOOD)
    assert load_trace(plain).block_size == 512
    headed = lines(tmp_path / "b.jsonl", {"block_size": 450}, GOOD)
    assert load_trace(headed).block_size == load_trace(headed, 450).block_size == 450
    assert len(load_trace(headed)) == 1
    with pytest.raises(BadInput, match="header of .* says 450"):
        load_trace(headed, 512)
    with pytest.raises(BadInput, match="at least 1"):
        load_trace(plain, 0)


def test_several_paths_or_one(tmp_path):
    path = lines(tmp_path / "a.jsonl", GOOD)
    assert [t.accesses for t in load_traces(str(path))] == [2]
    assert [t.accesses for t in load_traces([path, path])] == [2, 2]


BROKEN = [
    ("{not json", "not a line of JSON"),
    ("[1, 2]", "expected a JSON object"),
    ({"timestamp": 0, "input_length": 5}, "missing output_length, hash_ids"),
    (GOOD | {"timestamp": -1}, "timestamp must be milliseconds"),
    (GOOD | {"timestamp": "soon"}, "timestamp must be milliseconds"),
    (GOOD | {"input_length": 0}, "input_length must be a whole number"),
    (GOOD | {"input_length": 2.5}, "input_length must be a whole number"),
    (GOOD | {"output_length": -3}, "output_length must be"),
    (GOOD | {"hash_ids": [1, "b"]}, "hash_ids must be a list of whole numbers"),
    (GOOD | {"hash_ids": None}, "hash_ids must be a list"),
    (GOOD | {"hash_ids": [1]}, "1 hash_ids, but 900 tokens in blocks of 512 are 2"),
    (GOOD | {"hash_ids": [1, 2**64]}, "64 bits"),
]


@pytest.mark.parametrize("row, complaint", BROKEN, ids=[c for _, c in BROKEN])
def test_broken_lines_are_named_by_number(tmp_path, row, complaint):
    path = lines(tmp_path / "t.jsonl", GOOD, "", GOOD, row)
    with pytest.raises(BadInput) as error:
        load_trace(path)
    assert complaint in str(error.value) and f"{path}:4" in str(error.value)
    assert error.value.key == "trace.path"


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(BadInput, match="bundled traces: conversation, synthetic"):
        load_trace(tmp_path / "none.jsonl")
    packed = lzma.compress(json.dumps(GOOD).encode() * 1000)
    (tmp_path / "cut.jsonl.xz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "fake.jsonl.gz").write_bytes(b"plain text\n")
    for name in ("cut.jsonl.xz", "fake.jsonl.gz"):
        with pytest.raises(BadInput, match="cannot be read"):
            load_trace(tmp_path / name)


def test_coarser_blocks_follow_from_the_trie(tiny):
    trace = tiny([0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 6], [0, 1])
    twice = trace.coarser(2)
    assert list(twice.requests()) == [[0, 1, 2], [0, 1, 3], [4], [0]]
    assert twice.block_size == 8 and twice.tokens == trace.tokens
    assert list(trace.with_block_size(16).requests()) == [[0, 1], [0, 2], [3], [4]]
    assert trace.with_block_size(4) is trace


def test_coarser_equals_grouping_by_content(trie):
    for seed in range(30):
        trace = trie(seed, requests=30, depth=7)
        for multiple in (2, 3):
            names = {}
            wanted = [
                [names.setdefault(tuple(ids[: i + multiple]), len(names))
                 for i in range(0, len(ids), multiple)]
                for ids in trace.requests()
            ]  # fmt: skip
            assert list(trace.coarser(multiple).requests()) == wanted


@pytest.mark.parametrize("tokens", [2, 6, 1])
def test_finer_and_uneven_blocks_are_refused(tiny, tokens):
    with pytest.raises(BadInput, match="only multiples of that"):
        tiny([0, 1]).with_block_size(tokens)


def test_ids_that_are_not_chained_are_noticed(tiny):
    with pytest.raises(BadInput, match="block id 1 follows different blocks"):
        tiny([0, 1], [2, 1]).check_prefix_chained()


def test_sparse_and_negative_ids_are_renumbered(tiny):
    ids, count = tiny([-5, 2**40], [-5]).dense
    assert count == 2 and ids.tolist() == [0, 1, 0]


def test_streaming_takes_memory_of_a_piece_not_of_the_file(tmp_path):
    path = tmp_path / "long.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as out:
        for i in range(20_000):
            row = GOOD | {"input_length": 5120, "hash_ids": list(range(10 * i, 10 * i + 10))}
            out.write(json.dumps(row) + "\n")
    tracemalloc.start()
    total = sum(piece.accesses for piece in TraceStream(path, piece=10_000).pieces())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 200_000
    assert peak < 1.5e6  # the whole trace as int64 would be 1.6 MB and more
