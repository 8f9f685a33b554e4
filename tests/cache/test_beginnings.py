"""Prompts in one packed step: what each would be alone, in the block and to the bit of a format."""

from __future__ import annotations

import pytest
import torch

from kvlab.cache.beginnings import beginnings
from kvlab.format import by_name
from kvlab.kernel import attend_sdpa
from kvlab.model import Packed, PagedCache, forward_chunk

PROMPTS = [list(range(1, 30)), [7], list(range(40, 48)), list(range(3, 38)), list(range(90, 93))]
AXES = {
    "plain": {}, "int8": {"format": "int8"}, "kernels": {"kernels": "triton", "block_size": 16},
    "listens": {"policy": "attention_mass", "evict": "block", "budget_blocks": 40},
    "window": {"policy": "fifo", "budget_percent": 60},
    "host": {"policy": "fifo", "budget_blocks": 14, "offload": "host"},
    "layers": {"groups": "per_layer"}, "residual": {"format": by_name("int8", residual=16)},
}


@pytest.mark.parametrize("name", AXES)
def test_packed_prompts_are_those_of_single_ones(name, tiny_model):
    if name == "kernels":
        pytest.importorskip("triton")
    model, axes = tiny_model(), {"format": "fp32", "block_size": 8} | AXES[name]
    cache = PagedCache.for_model(model, **axes)
    seqs, packed = [cache.open() for _ in PROMPTS], Packed(model, cache)
    begun = packed.forward(seqs[:1], [PROMPTS[0][:11]])  # it goes on beside those that begin
    logits = packed.forward(seqs, [PROMPTS[0][11:], *PROMPTS[1:]])
    cache.check()
    for row, prompt in enumerate(PROMPTS):
        alone = PagedCache.for_model(model, **axes)
        if row == 0:
            want = forward_chunk(model, torch.tensor([prompt[:11]]), alone, last=True)[:, -1]
            torch.testing.assert_close(begun, want, atol=1e-4, rtol=1e-4)
            prompt = prompt[11:]
        want = forward_chunk(model, torch.tensor([prompt]), alone, last=True)[0, -1]
        if name != "host":  # there, blocks of the others leave for it
            torch.testing.assert_close(logits[row], want, atol=1e-4, rtol=1e-4)
    assert [cache.length(seq) for seq in seqs] == list(map(len, PROMPTS))


def test_who_is_computed_together(tiny_model):
    model = tiny_model()
    for axes, wanted in (({}, 3), (AXES["listens"], None), (AXES["window"], 3)):
        cache = PagedCache.for_model(model, **{"format": "fp32", "block_size": 8} | axes)
        seqs = [cache.open() for _ in range(4)]
        running = cache.begin(seqs, [1, 9, 8, 20])
        group = cache.groups[0]
        many = beginnings(group, [row[0] for row in running.rows])
        assert (many and len(many.extents)) == wanted
        if many:
            assert many.bounds == [0, 9, 17, 37] and len(many.blocks) == 4
        cache.abort()


def test_each_attends_to_itself_alone():
    q, k, v = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    bounds = [0, 5, 6, 12]
    out = attend_sdpa.attend_each(q, k, v, bounds, torch.tensor(bounds), scale=0.3)
    for begin, end in zip(bounds, bounds[1:]):
        own = slice(begin, end)
        want, _ = attend_sdpa.attend(q[own].transpose(0, 1), k[own], v[own], scale=0.3, causal=True)
        torch.testing.assert_close(out[own], want.transpose(0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_one_call_on_a_gpu(dim):
    bounds = [0, 700, 701, 1500, 2048]
    q, k, v = (torch.randn(2048, heads, dim, device="cuda", dtype=torch.bfloat16)
               for heads in (8, 2, 2))  # fmt: skip
    there = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    out = attend_sdpa.attend_each(q, k, v, bounds, there, scale=dim**-0.5)
    want = attend_sdpa.attend_each(*(x.float().cpu() for x in (q, k, v)), bounds, None,
                                   scale=dim**-0.5)  # fmt: skip
    torch.testing.assert_close(out.float().cpu(), want, atol=0.02, rtol=0.02)
