"""Rotary angles in one launch against the library's own."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

angles_triton = pytest.importorskip("kvlab.kernel.angles_triton")


@pytest.mark.parametrize("dim", [64, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles(dim, dtype, device):
    config = Qwen3Config(head_dim=dim, hidden_size=4 * dim, num_attention_heads=4)
    rotary = Qwen3RotaryEmbedding(config).to(device)
    positions = torch.tensor([[0], [7], [199_999]], device=device)
    want = rotary(torch.zeros(1, dtype=dtype, device=device), positions)
    got = angles_triton.angles(positions, rotary.inv_freq, rotary.attention_scaling, dtype)
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-6 if dtype == torch.float32 else 2**-8, rtol=0)
