"""What a request found in the prefix cache, block by block, and why the rest missed."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from kvlab.blocks import Chain

# Codes of the blocks of a prompt, one letter each.
REASONS = {
    "h": "hit",
    "H": "hit_host",  # came back from the host tier
    "n": "never_seen",
    "e": "evicted",
    "g": "behind_gap",  # held, but a block before it is not
    "l": "behind_hole",  # computed once, behind a hole of a lossy cache: not shared
    "r": "last_token",  # held, but the last token of a prompt is always computed
    "t": "tail_not_full",  # the prompt's last tokens fill no block
}


class Audit(NamedTuple):
    """One request. codes: a letter of `REASONS` for each block; bytes that attention reads and
    nobody had to compute, and of them those copied from the host; FLOPs of a cold prefill."""

    tokens: int
    hit_tokens: int
    codes: str
    bytes_loaded: int
    host_bytes_loaded: int
    flops: float
    flops_saved: float

    def row(self, seq: int | None = None, flops_per_second: float | None = None) -> dict:
        """As a plain record; `ms_saved` where the speed of a cold prefill is given."""
        counts = Counter(self.codes)
        misses = {name: counts[code] for code, name in REASONS.items()}
        percent = 100.0 * self.flops_saved / self.flops if self.flops else 0.0
        ms = None if flops_per_second is None else 1e3 * self.flops_saved / flops_per_second
        return {"seq": seq, **self._asdict(), **misses, "flops_saved_percent": percent,
                "ms_saved": ms}


def audited(cache, chain: Chain | None, near: int, hit: int) -> Audit | None:
    """What a request to this `PagedCache` is about to find.

    hit: leading blocks that it begins with, the first `near` of them on the device.
    """
    if chain is None:
        return None
    g, share = cache.geometry, cache.groups[0].share
    names, found = chain.names(), share.found(chain)
    codes = "h" * near + "".join(code_of(share, names[i], found[i], i, hit, chain)
                                 for i in range(near, len(names)))
    codes += "t" * (chain.tokens % g.block_size > 0)
    tokens, block_bytes = hit * g.block_size, cache.spec.format.block_bytes(g)
    return Audit(
        chain.tokens, tokens, codes, hit * block_bytes, codes.count("H") * block_bytes,
        float(cache.shape.prefill_flops(chain.tokens)), float(cache.shape.prefill_flops(tokens)),
    )


def code_of(share, name: int, block: int | None, index: int, hit: int, chain: Chain) -> str:
    if index < hit:
        return "H" if block is None else "h"
    if block is not None or share.host.has(name, chain.raw(index)):
        last = index == hit and (index + 1) * chain.block_size == chain.tokens
        return "r" if last else "g"
    if name in share.left:
        return "e"
    return "l" if name in share.refused else "n"
