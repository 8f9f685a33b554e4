"""What a cache holds, in counts and bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvlab.cache.layers import Layers
from kvlab.core import CacheGeometry


class CacheStats(NamedTuple):
    """Counts are tokens and blocks; bytes are summed over layers.

    nominal_bytes: the payload bits alone, for every token seen (what a paper's ratio promises);
        those of the compute dtype for tokens of the residual.
    logical_bytes: blocks in use, with scales and zeros, open blocks counted by their tokens, what
        stands for evicted tokens, origins, first tokens that are kept apart, digests, and the
        residual.
    allocated_bytes: every tensor the cache holds: whole slabs, open blocks, tables.
    peak_allocated_bytes: the most that was at one time since the cache was made, or since
        `PagedCache.reset_peak`; in the middle of a step it is more than before and after.
    host_bytes: bytes of the past kept in host memory (0 without offload).
    workspace_bytes: buffers that pieces of the past pass through, scratch memory and block tables
        of the decode kernels, and the last queries of each sequence where summaries are fitted to
        them; bounded but for the tables (4 bytes a block), whatever the number of tokens.
    prefix_tokens: tokens of blocks that further sequences may start with (prefix=hash).
    digest_bytes: of the allocated ones, what retrieval chooses by.
    origin_bytes: of the allocated ones, what the kept tokens of cut blocks read at first.
    residual_bytes: of the allocated ones, newest blocks as they were computed, held beside what is
        stored of them.
    read_tokens: tokens that a head reads for the next token of every sequence; without retrieval
        all that are resident.
    summary_fallbacks: KV heads of evicted pieces, summed over layers, that were merged because a
        fit was not finite or worse (summary=fitted).
    bits_per_element: allocated bits for each key or value element that is held, without what
        stands for evicted tokens. effective_bits: for each element of all tokens seen.

    `tokens` counts what each sequence sees, a shared prefix once for each; blocks and bytes count
    it once.
    With several layer groups `blocks` and `evictions` count each group's own; what left a model's
    own sliding window counts as evicted.
    """

    tokens: int
    resident_tokens: int
    blocks: int
    evictions: int
    nominal_bytes: int
    logical_bytes: int
    allocated_bytes: int
    host_bytes: int
    bits_per_element: float
    workspace_bytes: int = 0
    prefix_tokens: int = 0
    digest_bytes: int = 0
    read_tokens: int = 0
    peak_allocated_bytes: int = 0
    origin_bytes: int = 0
    summary_fallbacks: int = 0
    residual_bytes: int = 0
    effective_bits: float = 0.0

    @property
    def resident_tokens_percent(self) -> float:
        return 100.0 * self.resident_tokens / max(1, self.tokens)


def counted(layers: Layers, lengths: Iterable[int], prefix_tokens: int) -> CacheStats:
    """The account of a cache whose sequences have these lengths, over all layer groups.

    prefix_tokens: of what is known beyond them.
    """
    g, groups, allocated = layers.geometry, layers.groups, layers.allocated_bytes
    tokens, parts = sum(lengths), [group.pool.geometry for group in groups]
    held = [round(group.sealed_blocks * g.block_size) + group.open_tokens for group in groups]
    elements = sum(n * part.elements_per_token for n, part in zip(held, parts))
    blocks = sum(round(group.sealed_blocks * group.pool.format.block_bytes(part))
                 for group, part in zip(groups, parts))  # fmt: skip
    tails = sum(group.open_tokens * part.elements_per_token * layers.dtype.itemsize
                for group, part in zip(groups, parts))  # fmt: skip
    entries = sum(group.summaries.nbytes for group in groups)
    origins = sum(group.origins.nbytes for group in groups)
    apart = sum(group.pool.apart.nbytes for group in groups)
    scores = sum(group.watch.nbytes for group in groups)
    residual = sum(group.recent.nbytes for group in groups)
    digests = sum(group.sources.digest_used_nbytes for group in groups)
    computed = 8 * layers.dtype.itemsize
    newest = sum(group.recent.tokens * (part.elements_per_token * computed
                                        - group.pool.format.token_bits(part))
                 for group, part in zip(groups, parts))  # fmt: skip
    return CacheStats(
        tokens=tokens, resident_tokens=round(_layer_mean(held, parts)),
        blocks=sum(group.ledger.held_count for group in groups),
        evictions=sum(group.held.room.evictions for group in groups),
        nominal_bytes=(tokens * layers.spec.format.token_bits(g) + newest) // 8,
        logical_bytes=blocks + tails + entries + origins + scores + apart + digests + residual,
        allocated_bytes=allocated,
        host_bytes=sum(group.sources.host_nbytes for group in groups),
        bits_per_element=8 * (allocated - entries) / max(1, elements),
        effective_bits=8 * allocated / max(1, tokens * g.elements_per_token),
        prefix_tokens=prefix_tokens,
        workspace_bytes=layers.workspace.nbytes
        + sum(group.sources.workspace_nbytes for group in groups),
        digest_bytes=sum(group.sources.digest_nbytes for group in groups),
        read_tokens=round(_layer_mean([group.read_tokens for group in groups], parts)),
        peak_allocated_bytes=layers.meter.peak, origin_bytes=origins,
        summary_fallbacks=sum(group.summaries.fallbacks for group in groups),
        residual_bytes=residual,
    )


def _layer_mean(numbers: list[int], parts: list[CacheGeometry]) -> float:
    """The mean over layers of a number of each layer group."""
    layers = [part.layers for part in parts]
    return sum(n * count for n, count in zip(numbers, layers)) / sum(layers)
