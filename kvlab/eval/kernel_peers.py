"""Attention kernels of others on the same shapes: torch's own, and FlashInfer where installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlab.eval.kernels import Shape

try:
    import flashinfer
except ImportError:
    flashinfer = None

PAGE = 16  # tokens of a FlashInfer page
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
Peer = tuple[str, str, Callable[[], object], int]  # name, format, call, bytes it reads


def decode_peers(shape: Shape, rows: int, tokens: int) -> Iterator[Peer]:
    """One query token per row over dense, or paged, keys and values; made when asked for."""
    for name, backend in BACKENDS.items():
        yield name, "bf16", *_dense(shape, rows, tokens, backend)
    if flashinfer:
        for kind, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
            yield "flashinfer", kind, *_paged(shape, rows, tokens, dtype)


def _dense(shape: Shape, rows: int, tokens: int, backend) -> tuple[Callable, int]:
    q = shape.random(rows, 1, heads=shape.kv_heads * shape.group).transpose(1, 2).contiguous()
    k, v = (shape.random(rows, shape.kv_heads, heads=tokens) for _ in range(2))

    def call():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return call, 2 * k.nbytes


def _pages(shape: Shape, rows: int, tokens: int, dtype):
    pages = rows * (tokens // PAGE)
    kv = shape.random(pages, 2, PAGE, heads=shape.kv_heads).to(dtype)
    ints = partial(torch.tensor, dtype=torch.int32, device=shape.device)
    starts = ints([row * (tokens // PAGE) for row in range(rows + 1)])
    order = torch.randperm(pages, device=shape.device).int()
    return kv, (starts, order, ints([PAGE] * rows))


def _paged(shape: Shape, rows: int, tokens: int, dtype) -> tuple[Callable, int]:
    kv, table = _pages(shape, rows, tokens, dtype)
    work = torch.empty(256 << 20, dtype=torch.uint8, device=shape.device)
    heads = shape.kv_heads * shape.group
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work, "NHD", use_tensor_cores=True)
    wrapper.plan(*table, heads, shape.kv_heads, shape.head_dim, PAGE,
                 q_data_type=torch.bfloat16, kv_data_type=dtype)
    return partial(wrapper.run, shape.random(rows, heads=heads), kv), kv.nbytes


def prefill_peers(shape: Shape, tokens: int, past: int) -> Iterator[Peer]:
    """`tokens` new ones over `past` + themselves, causal, bf16."""
    if not flashinfer:
        return
    kv, table = _pages(shape, 1, past + tokens, torch.bfloat16)
    work = torch.empty(256 << 20, dtype=torch.uint8, device=shape.device)
    heads = shape.kv_heads * shape.group
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(work, "NHD")
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=shape.device)
    wrapper.plan(starts, *table, heads, shape.kv_heads, shape.head_dim, PAGE, causal=True,
                 q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    call = partial(wrapper.run, shape.random(tokens, heads=heads), kv)
    yield "flashinfer", "bf16", call, kv.nbytes
