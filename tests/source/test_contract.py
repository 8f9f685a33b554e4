"""A source from outside takes part in attention, in chunks and decoded tokens alike."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

from kvlab.core import KvlabError
from kvlab.source import Part, Source, Token, merged
from kvlab.source.base import Read

sys.path.append(str(Path(__file__).parents[1] / "cache"))
from driver import SCALE, make, oracle  # noqa: E402

KERNELS = ("torch", "triton")


class Constant(Source):
    """The same keys and values for every sequence, each standing for as many tokens as `counts`."""

    nbytes = workspace_nbytes = 0

    def __init__(self, k, v, counts):
        self.k, self.v, self.bias = k, v, counts.log()
        self.heard: list[tuple] = []

    def open(self, seq):
        self.heard.append(("open", seq))

    def fork(self, parent, child):
        self.heard.append(("fork", parent, child))

    def crop(self, seq, length):
        self.heard.append(("crop", seq, length))

    def close(self, seq):
        self.heard.append(("close", seq))

    def parts(self, ask):
        yield Part(self.k, self.v, bias=self.bias)


def cache_with(kernels, counts, **axes):
    """A cache and what its source holds: two keys, standing for `counts` tokens each."""
    cache = make(1, 4, 2, 32, kernels=kernels, **axes)
    k, v = torch.randn(2, 2, 2, 32, generator=torch.Generator().manual_seed(1))
    constant = Constant(k, v, torch.tensor(counts, dtype=torch.float32)[:, None].expand(2, 2))
    cache.groups[0].sources.add(constant)
    return cache, constant


@pytest.mark.parametrize("kernels", KERNELS)
def test_constant_entries_are_read_by_chunks_and_decoded_tokens(kernels):
    if kernels == "triton" and torch.cuda.is_available():
        pytest.skip("kernels run on the CPU only where Triton interprets them")
    cache, constant = cache_with(kernels, (1, 3))
    seqs, random = [cache.open(), cache.open()], torch.Generator().manual_seed(0)
    weights = [1, 3]
    extra = [x.repeat_interleave(torch.tensor(weights), 0) for x in (constant.k, constant.v)]
    past = dict.fromkeys(seqs, extra)
    for count in (6, 1, 1, 5, 1):
        cache.begin(seqs, [count] * 2)
        assert cache.running.decodes == (kernels == "triton" and count == 1)
        q = torch.randn(2, 4, count, 32, generator=random)
        k, v = torch.randn(2, 2, 2, count, 32, generator=random)
        out = cache.attend(0, q, k, v, scale=SCALE)
        cache.commit()
        for row, seq in enumerate(seqs):
            new = k[row].transpose(0, 1), v[row].transpose(0, 1)
            past[seq] = [torch.cat(x) for x in zip(past[seq], new)]
            keep = torch.ones(len(past[seq][0]), dtype=torch.bool)
            want = oracle(q[row], *past[seq], keep, None)
            torch.testing.assert_close(out[row].transpose(0, 1), want, rtol=0, atol=2e-4)
    assert not cache.capturable, "nothing says that it waits for nothing"


def test_it_lives_with_the_sequences():
    cache, constant = cache_with("torch", (1, 1))
    seq = cache.open()
    cache.begin([seq], [6])
    x = torch.zeros(1, 2, 6, 32)
    cache.store(0, x, x)
    cache.commit()
    child = cache.fork(seq)
    cache.truncate(child, 3)
    cache.close(seq)
    assert constant.heard == [
        ("open", seq), ("open", child), ("fork", seq, child), ("crop", child, 3), ("close", seq)
    ]  # fmt: skip
    twin = copy.deepcopy(cache)
    twin.close(child)
    assert constant.heard[-1] == ("close", seq), "a copy has sources of its own"
    with pytest.raises(KvlabError, match="before its first sequence"):
        cache.groups[0].sources.add(Source())


def test_its_bytes_count():
    cache, constant = cache_with("torch", (1, 1))
    constant.workspace_nbytes = 77
    assert cache.stats().workspace_bytes == 77


def test_an_empty_source_changes_nothing():
    assert Source().decode(Token(0, [None], torch.zeros(1, 2, 4), 1.0, None)) == []
    assert list(Source().parts(None)) == [] and Source().in_place() == []


def test_parts_merge_as_one_softmax():
    """Three parts of one row of logits, with masses of two blocks in the second."""
    logits, values = torch.randn(1, 1, 6), torch.randn(6, 3)
    cuts = ((0, 2), (2, 4), (4, 6))
    reads = [
        Read(logits[..., a:b].softmax(-1) @ values[a:b], logits[..., a:b].logsumexp(-1),
             logits[..., a:b].softmax(-1) if a == 2 else None)
        for a, b in cuts
    ]  # fmt: skip
    out, lse = merged(reads, wants_lse=True)
    torch.testing.assert_close(out, logits.softmax(-1) @ values)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(reads[1].mass, logits.softmax(-1)[..., 2:4])


def test_scratch_of_the_decode_kernels_is_in_the_account():
    if torch.cuda.is_available():
        pytest.skip("kernels run on the CPU only where Triton interprets them")
    cache = make(1, 4, 2, 32, kernels="triton")
    seq, other = cache.open(), make(1, 4, 2, 32, kernels="triton")
    before = cache.stats().workspace_bytes
    for count in (5, 1):
        cache.begin([seq], [count])
        x = torch.randn(1, 2, count, 32)
        cache.attend(0, torch.randn(1, 4, count, 32), x, x, scale=SCALE)
        cache.commit()
    scratch, tables = cache.workspace.scratch, cache.groups[0].sources.sealed.workspace_nbytes
    assert scratch.nbytes == sum(x.untyped_storage().nbytes() for x in scratch.tensors) > 0
    side_by_side = sum(x.nbytes for x in cache.workspace._buffers)  # of the chunk
    assert cache.stats().workspace_bytes == before + scratch.nbytes + tables + side_by_side
    assert not other.workspace.scratch.nbytes, "nobody else's"
    assert not copy.deepcopy(cache).workspace.scratch.nbytes
