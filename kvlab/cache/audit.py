"""What a request found in the prefix cache, block by block, and why the rest missed."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from kvlab.blocks import Chain, Opened
from kvlab.cache.layers import Layers

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
MISSING_FIRST = "elngrHht"  # what one layer group says counts before what another says


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


def audited(layers: Layers, opened: Opened, chain: Chain) -> Audit:
    """What a request is about to find in a cache of `layers`: `opened`, of the prompt `chain`.

    A block is there where every layer group has it: of several reasons the one counts that is
    nearest to its being gone (`MISSING_FIRST`).
    """
    shape, tokens = layers.shape, opened.hit * layers.geometry.block_size
    known = [group.held.known for group in layers.groups]
    each = [k.reasons.codes(opened._replace(found=k.found(chain), away=k.away(chain)), chain)
            for k in known]  # fmt: skip
    codes = "".join(min(column, key=MISSING_FIRST.index) for column in zip(*each))
    sizes = [g.pool.format.block_bytes(g.pool.geometry) for g in layers.groups]
    return Audit(
        chain.tokens, tokens, codes, opened.hit * sum(sizes),
        sum(size * own.count("H") for size, own in zip(sizes, each)),
        float(shape.prefill_flops(chain.tokens)), float(shape.prefill_flops(tokens)),
    )
