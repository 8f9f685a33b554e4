"""Attention of short chunks in parts of the keys."""

import pytest
import torch

from kvlab.kernel import attend_ref, attend_sdpa
from kvlab.kernel.attend_sdpa import best_parts


@pytest.mark.parametrize("tiles, keys, parts", [
    (64, 65_536, 2),      # 512 queries of 16 heads on 132 multiprocessors
    (32, 65_536, 4),
    (16, 65_536, 8),
    (80, 65_536, 8),      # one round of 80, or 4.85 rounds of an eighth
    (512, 65_536, 1),     # 4,096 queries: full rounds as they are
    (1024, 65_536, 1),
    (64, 65_537, 1),      # not to be cut evenly
    (16, 3_072, 3),       # parts of at least 1,024 keys
    (16, 1_024, 1),
])  # fmt: skip
def test_parts_fill_the_device_where_it_is_worth_it(tiles, keys, parts):
    assert best_parts(tiles, keys, 132) == parts


def test_on_the_cpu_there_is_one_part():
    q, k, v = (torch.randn(n, 64, 8) for n in (4, 64, 64))
    q, k, v = q, k.transpose(0, 1)[:, :2].contiguous(), v.transpose(0, 1)[:, :2].contiguous()
    out, lse = attend_sdpa.attend_parts(q, k, v, scale=0.3)
    expected = attend_ref.attend(q, k, v, scale=0.3)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 100, 512, 700])
def test_parts_merge_to_the_whole(tokens):
    random = torch.Generator("cuda").manual_seed(3)
    q = torch.randn(16, tokens, 128, device="cuda", dtype=torch.bfloat16, generator=random)
    k, v = (torch.randn(8192, 8, 128, device="cuda", dtype=torch.bfloat16, generator=random)
            for _ in range(2))  # fmt: skip
    parts = attend_sdpa.attend_parts(q, k, v, scale=128**-0.5)
    assert parts[0].dim() == 4 and len(parts[0]) > 1
    out, lse = attend_sdpa.merge(list(zip(*parts)))
    expected, expected_lse = attend_ref.attend(*(x.double() for x in (q, k, v)), scale=128**-0.5)
    torch.testing.assert_close(lse, expected_lse.float(), atol=2e-3, rtol=0)
    # bf16 results of parts: relative rounding 2^-9 of values around 1/90
    torch.testing.assert_close(out, expected.float(), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("tokens, n", [(1, 1), (5, 5), (1, 9), (7, 30)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_last_tokens_see_those_up_to_their_own(tokens, n, softcap):
    q, k, v = torch.randn(4, tokens, 8), torch.randn(n, 2, 8), torch.randn(n, 2, 8)
    parts = attend_sdpa.attend_last(q, k, v, scale=0.3, softcap=softcap)
    out, lse = attend_sdpa.merge(parts)
    expected = attend_ref.attend(q, k, v, scale=0.3, causal=True, q_start=n - tokens,
                                 softcap=softcap)  # fmt: skip
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("heads, kv_heads, dim", [(9, 3, 64), (14, 2, 64), (16, 8, 128)])
@pytest.mark.parametrize("tokens, n", [
    (512, 512), (512, 1331), (100, 4001), (16, 50), (1024, 8192)])
def test_one_call_sees_past_and_own(tokens, n, heads, kv_heads, dim):
    random = torch.Generator("cuda").manual_seed(3)
    how = {"device": "cuda", "dtype": torch.bfloat16, "generator": random}
    q = torch.randn(heads, tokens, dim, **how)
    k, v = (torch.randn(n, kv_heads, dim, **how) for _ in range(2))
    parts = attend_sdpa.attend_last(q, k, v, scale=dim**-0.5)
    assert len(parts) == 1
    expected, expected_lse = attend_ref.attend(*(x.double() for x in (q, k, v)), scale=dim**-0.5,
                                               causal=True, q_start=n - tokens)  # fmt: skip
    out, lse = parts[0]
    torch.testing.assert_close(lse, expected_lse.float(), atol=2e-3, rtol=0)
    torch.testing.assert_close(out.float(), expected.float(), atol=1e-2, rtol=2e-2)
