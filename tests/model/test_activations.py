"""The formula of a chunk's activations beside the tensors that are really alive on the way."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvlab.cache import group
from kvlab.kernel import attend_sdpa
from kvlab.model import PagedCache, fuse
from kvlab.model.fuse import fused
from kvlab.model.load import RandomModel
from kvlab.model.prefill import prefill
from kvlab.model.room import activation_bytes, standing_bytes, weight_bytes
from kvlab.source import Sum

SHAPE = {"hidden_size": 256, "layers": 3, "kv_heads": 2, "head_dim": 128, "vocabulary": 8192}


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, and the most alive at one time."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Attention, its sum and norms that take what their CUDA counterparts take; all say nothing."""

    def attend(q, k, v, **options):  # cuDNN answers in the queries' dtype and layout
        return torch.empty_like(q), torch.zeros(q.shape[:2])

    kernels = SimpleNamespace(merge_into=lambda *parts: None)
    monkeypatch.setattr(attend_sdpa, "attend", attend)
    monkeypatch.setattr(group, "Sum", lambda fused, *sinks: Sum(kernels, *sinks))
    monkeypatch.setattr(fuse, "_norm", lambda module, x: torch.empty_like(x))
    monkeypatch.setattr(fuse, "MOST_ROWS", 1)  # the way of long chunks, at sizes that are quick
    monkeypatch.setattr(group, "ONE_CALL", 1)


def peak_of_a_chunk(model, tokens: int) -> int:
    """Bytes alive at the peak of a prompt of one chunk, but for the cache."""
    gc.collect()
    cache = PagedCache.for_model(model, format="bf16", block_size=16)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.inference_mode(), fused(model), Live() as live:
        prefill(model, ids, cache, chunk_tokens=tokens)
    return live.peak - cache.stats().peak_allocated_bytes


@pytest.mark.parametrize("heads, mlp", [(4, 768), (8, 768), (2, 4096)])
def test_the_formula_says_what_a_token_of_a_chunk_takes(as_on_cuda, heads, mlp):
    loader = RandomModel(**SHAPE, query_heads=heads, mlp_size=mlp, seed=0)
    model = loader.load(torch.device("cpu")).model.to(torch.bfloat16)
    less, more = (peak_of_a_chunk(model, n) for n in (512, 1024))
    # A row without padding needs no place for its result: what attention gives is handed on.
    place = 2 * heads * SHAPE["head_dim"] if mlp == 768 else 0  # where attention is the widest
    told = activation_bytes(model.config) - place
    assert (more - less) / 512 == pytest.approx(told, rel=0.01)


def test_activations_of_the_model_of_the_reports():
    config = SimpleNamespace(num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                             hidden_size=1024, intermediate_size=3072)  # fmt: skip
    assert activation_bytes(config) == 31_368
    config.intermediate_size = 8192  # the MLP is wider then
    assert activation_bytes(config) == 4 * 2 * 1024 + 8 + 4 * 128 + 3 * 2 * 8192


def test_nothing_stands_where_nothing_is_counted():
    model = torch.nn.Linear(3, 5)
    assert weight_bytes(model) == 80 and standing_bytes(model, torch.device("cpu")) == 0
