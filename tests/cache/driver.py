"""Drives a PagedCache without a model, and remembers what every token was."""

from __future__ import annotations

import pytest
import torch

from kvlab.cache import CacheSpec, PagedCache
from kvlab.pool import SlabStore

SCALE = 0.25


def make(layers=2, query_heads=4, kv_heads=2, head_dim=16, device="cpu", dtype=torch.float32,
         inv_freq=None, **axes) -> PagedCache:  # fmt: skip
    if axes.get("kernels") == "triton" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels run on the CPU only where Triton interprets them")
    spec = CacheSpec(**{"format": "fp32", "block_size": 4} | axes)
    g = spec.geometry(layers, query_heads, kv_heads, head_dim)
    return PagedCache(g, spec, device=device, dtype=dtype, inv_freq=inv_freq)


def held_bytes(cache: PagedCache) -> int:
    """Counted from the storages, not from the cache's own arithmetic.

    Without the kernels' address tables: they stay, 64 KiB each, since graphs refer to them.
    """
    stores: list[SlabStore] = [s for g in cache.groups
                               for s in (g.pool.sealed, g.pool.open, g.pool.apart.store)]
    stores += [g.sources.digests.store for g in cache.groups if cache.spec.retrieval.selects]
    return sum(t.untyped_storage().nbytes() for s in stores for t in s.slabs.values())


class Driver:
    """Steps with random contents; `past` remembers each sequence's keys and values as stored.

    past[seq][layer]: fp32 k and v [tokens, H, D].
    """

    def __init__(self, cache: PagedCache, seed: int = 0):
        self.cache, self.past = cache, {}
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, *shape):
        x = torch.randn(*shape, generator=self.random)
        return x.to(self.cache.device, self.cache.dtype)

    def open(self) -> int:
        g, seq = self.cache.geometry, self.cache.open()
        empty = torch.zeros(0, g.kv_heads, g.head_dim, device=self.cache.device)
        self.past[seq] = [(empty, empty)] * g.layers
        return seq

    def close(self, seq):
        self.cache.close(seq)
        del self.past[seq]

    def fork(self, seq) -> int:
        child = self.cache.fork(seq)
        self.past[child] = list(self.past[seq])
        return child

    def truncate(self, seq, length):
        self.cache.truncate(seq, length)
        self.past[seq] = [(k[:length], v[:length]) for k, v in self.past[seq]]

    def step(self, seqs, counts, layers=None, window=None):
        """begin, attend in `layers` (all), commit if that was all of them; checks attention."""
        g, longest = self.cache.geometry, max(counts)
        self.cache.begin(seqs, counts)
        for layer in range(g.layers if layers is None else layers):
            q = self.draw(len(seqs), g.query_heads, longest, g.head_dim)
            k, v = (self.draw(len(seqs), g.kv_heads, longest, g.head_dim) for _ in range(2))
            out = self.cache.attend(layer, q, k, v, scale=SCALE, window=window)
            for row, (seq, count) in enumerate(zip(seqs, counts)):
                new = slice(longest - count, longest)
                fresh = [x[row, :, new].transpose(0, 1).float() for x in (k, v)]
                self.check_row(out[row], q[row], fresh, seq, layer, count, window)
                if layers is None:
                    old = self.past[seq][layer]
                    self.past[seq][layer] = tuple(map(torch.cat, zip(old, fresh)))
        if layers is None:
            self.cache.commit()
            for seq in seqs:
                self.settle(seq)

    def check_row(self, out, q, fresh, seq, layer, count, window):
        """Attention over the dequantized past and the exact new tokens, in one fp32 softmax."""
        pad = out.shape[0] - count
        assert (out[:pad] == 0).all()
        if not count:
            return
        past = self.past[seq][layer]
        k, v = map(torch.cat, zip(past, fresh))
        keep = self.resident(seq, layer, len(past[0]))
        keep = torch.cat([keep, torch.ones(count, dtype=torch.bool)]).to(k.device)
        want = oracle(q[:, pad:], k, v, keep, window)
        tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
        atol = tolerance[self.cache.dtype] * (10 if self.cache.spec.kernels == "triton" else 1)
        torch.testing.assert_close(out[pad:].transpose(0, 1).float(), want, rtol=0, atol=atol)

    def resident(self, seq, layer, length):
        """Bool [length]: tokens whose block is no hole."""
        group = self.cache.groups[self.cache.place[layer][0]]
        keep = torch.ones(length, dtype=torch.bool)
        for hole in group.tables[seq].holes:
            if group.away.key(seq, hole) is not None:
                continue
            keep[hole * group.block_size : (hole + 1) * group.block_size] = False
        return keep

    def settle(self, seq):
        """Replace sealed tokens of `past` by what their blocks hold, read back from the pool."""
        for layer, (k, v) in enumerate(self.past[seq]):
            k, v = k.clone(), v.clone()
            number, local = self.cache.place[layer]
            group = self.cache.groups[number]
            size = group.block_size
            for index, block in enumerate(group.tables[seq].ids[: len(k) // size]):
                key = group.away.key(seq, index)
                if key is not None:
                    at = slice(index * size, (index + 1) * size)
                    k[at], v[at] = (x.float() for x in group.away.shelf.read(local, [key]))
                elif block is not None:
                    at = slice(index * size, (index + 1) * size)
                    k[at], v[at] = (x.float() for x in group.pool.read(local, [block]))
            self.past[seq][layer] = (k, v)


def oracle(q, k, v, keep, window):
    """fp32 softmax over the kept tokens; queries are the last tokens of `k`."""
    tokens, n = q.shape[1], k.shape[0]
    logits = torch.einsum(
        "htd,nhd->htn", q.float(), k.repeat_interleave(q.shape[0] // k.shape[1], 1)
    )
    at = torch.arange(n - tokens, n, device=q.device)[:, None]
    here = torch.arange(n, device=q.device)[None]
    seen = (here <= at) & keep[None]
    seen &= here > at - (window or n + 1)
    weights = (logits * SCALE).masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("htn,nhd->htd", weights, v.repeat_interleave(q.shape[0] // v.shape[1], 1))


__all__ = ["Driver", "SCALE", "held_bytes", "make", "oracle"]
