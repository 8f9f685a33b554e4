"""Bytes of a cache before there is one: the pool's own planes and slabs, and none allocated."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvlab.cache import CacheSpec
from kvlab.core import CacheGeometry
from kvlab.format import Dense, KVFormat
from kvlab.pool import FINE_SLAB_TOKENS, MAX_SLABS, SLAB_TOKENS, Apart, Meter, SlabStore, no_kernels

DENSE = KVFormat(Dense("bfloat16"), Dense("bfloat16"), "bf16")
ITEM = torch.bfloat16.itemsize
_STANDING = 6  # bytes of a token's score and of the steps that it is of, in each head
_DIGEST_ROWS = 64  # blocks whose digests come and go together, see `source/digests.py`


class Account(NamedTuple):
    """Bytes that a cache holds on the device and in host memory."""

    device: int
    host: int


def account(
    spec: CacheSpec, g: CacheGeometry, tokens: int, requests: int, kernels: bool = True
) -> Account:
    """What a cache holds when each of `requests` sequences has seen `tokens` tokens, in bf16.

    As `CacheStats.allocated_bytes` and `host_bytes` count it: whole slabs, open blocks, first
    tokens kept apart, the residual, digests, and the address tables of kernels where those run.
    """
    device = host = 0
    for layers in spec.format.groups(g):
        part, format = g.part(layers), spec.format.each(g.layers)[layers[0]]
        there = requests * held_blocks(spec, part, tokens)
        if spec.budget_percent is not None and not spec.offload.keeps:
            there = int(there * spec.budget_percent // 100)
        opened = requests if tokens % g.block_size else 0  # a budget counts open blocks, too
        on_device = there if spec.budget_blocks is None else min(
            there, max(0, spec.budget_blocks - opened))
        slab_tokens = FINE_SLAB_TOKENS if spec.by_token else SLAB_TOKENS
        sealed = _store(format, part, max(1, slab_tokens // g.block_size))
        device += -(-on_device // sealed.slab_rows) * sealed.slab_bytes
        device += opened * _store(DENSE, part, 1).slab_bytes
        device += requests * _apart(format, part, tokens)
        device += requests * _residual(spec, format, part, tokens)
        if spec.by_token and spec.member.scored:
            device += there * g.block_size * part.layers * part.kv_heads * _STANDING
        if kernels and no_kernels(format, part.shape) is None:
            device += MAX_SLABS * 8
        if spec.retrieval.selects:
            device += _digests(spec, part, requests * (tokens // g.block_size))
        if spec.offload.keeps and there > on_device:
            rows = max(1, spec.offload.slab_tokens // g.block_size)
            away = _store(format, part, rows)
            host += -(-(there - on_device) // rows) * away.slab_bytes
    return Account(device, host)


def _store(format: KVFormat, g: CacheGeometry, rows: int) -> SlabStore:
    return SlabStore(format.planes(g), g.layers, rows, "meta")


def held_blocks(spec: CacheSpec, g: CacheGeometry, tokens: int) -> int:
    """Sealed blocks of one sequence that its window, or the model's own, has not let go."""
    size, sealed = g.block_size, tokens // g.block_size
    first = (tokens - g.shape.seen(tokens)) // size
    if spec.window.middle or not spec.window.protected(tokens):
        return sealed - first
    held: set[int] = set()
    for begin, end in spec.window.readable(tokens):
        held |= set(range(begin // size, min(sealed, -(-end // size))))
    return sum(block >= first for block in held)


def _apart(format: KVFormat, g: CacheGeometry, tokens: int) -> int:
    if not format.sinks or tokens < g.block_size:
        return 0
    kept = min(format.sinks, g.block_size)
    return Apart(kept, g.shape, g.layers, torch.bfloat16, "meta", Meter()).store.slab_bytes


def _residual(spec: CacheSpec, format: KVFormat, g: CacheGeometry, tokens: int) -> int:
    """Newest blocks as they were computed, beside what is stored of them."""
    most = min(format.residual // g.block_size, held_blocks(spec, g, tokens))
    return most * _store(DENSE, g, 1).slab_bytes


def _digests(spec: CacheSpec, g: CacheGeometry, blocks: int) -> int:
    each = g.kv_heads * spec.retrieval.sides * g.shape.k_width * spec.retrieval.dtype.itemsize
    return -(-blocks // _DIGEST_ROWS) * _DIGEST_ROWS * each * g.layers


def workspace_bytes(spec: CacheSpec, g: CacheGeometry) -> int:
    """What dequantized pieces of the past pass through; as much again for what comes from host
    memory."""
    token = max(shape.elements for shape in g.shapes) * ITEM
    return spec.workspace_tokens * token * (2 if spec.offload.keeps else 1)
