"""What a cache holds, in counts and bytes."""

from __future__ import annotations

from typing import NamedTuple


class CacheStats(NamedTuple):
    """Counts are tokens and blocks; bytes are summed over layers.

    nominal_bytes: the payload bits alone, for every token seen (what a paper's ratio promises).
    logical_bytes: blocks in use, with scales and zeros, open blocks counted by their tokens, what
        stands for evicted tokens, and origins.
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
    read_tokens: tokens that a head reads for the next token of every sequence; without retrieval
        all that are resident.
    summary_fallbacks: KV heads of evicted pieces, summed over layers, that were merged because a
        fit was not finite or worse (summary=fitted).

    `tokens` counts what each sequence sees, a shared prefix once for each; blocks and bytes count
    it once.
    With a group for each layer, `blocks` and `evictions` count each layer's own.
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

    @property
    def resident_tokens_percent(self) -> float:
        return 100.0 * self.resident_tokens / max(1, self.tokens)
