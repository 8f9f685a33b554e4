"""Policies that keep the blocks of highest score, the score being made for them at prefill.

They differ in what they `observe`: the live cache computes that score (`kvlab/cache/scores.py`),
all but TOVA's from chunks only. A block that fills while tokens are decoded starts at the mean.
A trace has no scores, so the simulator replays these from recorded runs only.
"""

from __future__ import annotations

from kvlab.core import BadInput, check_number, checked_seed
from kvlab.policy.base import PriorityPolicy


class Scored(PriorityPolicy):
    """The block of smallest score leaves, the least recent of equals first."""

    scored = True

    def priority(self, meta):
        return meta.score, meta.last


class SnapKV(Scored):
    """The block that the last 64 queries of the prompt look at least leaves.

    SnapKV (Li et al. 2024, https://arxiv.org/abs/2404.14469): votes of an observation window,
    pooled over neighbouring tokens. No parameters; the window itself is kept by `window=sink`.
    Differs: whole blocks, the same ones for all heads of a layer group; evicts between chunks too,
    with the last queries of each chunk as window, where the paper does so once after prefill.
    """

    name = "snapkv"
    observes = by_token = "snapkv"


class ExpectedAttention(Scored):
    """The block that can expect least attention, weighted by its values' norms, leaves.

    Expected Attention (Devoto et al. 2025, https://arxiv.org/abs/2510.00636; NVIDIA's kvpress): the
    mean attention of queries from a normal distribution fitted to those seen. No parameters.
    Differs by block: the same for all heads of a layer group, all layers alike; tokens by head with
    cache.evict=token.
    """

    name = "expected_attention"
    observes = by_token = "expected_attention"


class KeyNorm(Scored):
    """The block with the largest keys leaves: keys of small norm attract attention.

    Devoto et al. 2024, https://arxiv.org/abs/2406.11430. No parameters. Differs: the mean norm of a
    block, the same choice for all heads of a layer group.
    """

    name = "key_norm"
    observes = by_token = "key_norm"


class KeyDiff(Scored):
    """The block whose keys point where all point leaves.

    KeyDiff (Park et al. 2025, https://arxiv.org/abs/2504.15364): keys unlike the mean of all are
    looked at. No parameters. Differs by block: the mean of a block, the same choice for all heads
    of a layer group; tokens by head with cache.evict=token.
    """

    name = "key_diff"
    observes = by_token = "key_diff"


class TOVA(Scored):
    """The block that the newest token looks at least leaves.

    TOVA (Oren et al. 2024, https://arxiv.org/abs/2401.06104). No parameters. Differs: whole blocks,
    the same ones for all layers of a layer group; in prefill the last token of a chunk decides.
    """

    name = "tova"
    observes = by_token = "tova"


class ScoredTokens(Scored):
    """A method that ranks single tokens and has no form for blocks."""

    name = ""
    observes = None


class H2O(ScoredTokens):
    """The token that got least attention in sum leaves.

    H2O (Zhang et al. 2023, https://arxiv.org/abs/2306.14048), see `kvlab.cache.observed.H2O`; the
    recent half of its budget is the window's business (`window=sink`). `policy=attention_mass` is
    the mean over those queries that could see a token.
    """

    name = "h2o"
    by_token = "h2o"


class KVzip(ScoredTokens):
    """The token that the model looks at least while it repeats the context leaves.

    KVzip (Kim et al. 2025, https://arxiv.org/abs/2505.23416), see `kvlab.cache.repeated.KVzip`. The
    whole context is held until it is over and was repeated (`kvlab.prefill` does that), so there is
    one context a cache, and a budget in percent of it; what comes later stays.
    piece: tokens of the context that are repeated at a time.
    With budget=all_heads heads of all layers compete, as published; otherwise each head keeps
    equally many. Differs: the sinks are the window's business; a chat template's first words count
    as context.
    """

    name = "kvzip"
    by_token: object = "kvzip"
    waits = True

    def __init__(self, piece: int = 2048):
        super().__init__()
        if isinstance(piece, bool) or piece < 1:
            raise BadInput("policy.piece", piece, "must be at least 1 token")
        self.piece = piece


class LagKV(ScoredTokens):
    """The token that sticks out least leaves, measured by the tokens after it.

    LagKV (Liang et al. 2025, https://arxiv.org/abs/2504.04704), see `kvlab.cache.keys.LagKV`.
    lag: tokens of a partition; sinks: first tokens that rank highest.
    """

    name = "lagkv"
    by_token: object = "lagkv"

    def __init__(self, lag: int = 128, sinks: int = 4):
        super().__init__()
        check_number("policy.lag", lag)
        check_number("policy.sinks", sinks, 0)
        self.lag, self.sinks = lag, sinks
        self.by_token = "lagkv", {"lag": lag, "sinks": sinks}


class Compactor(ScoredTokens):
    """The token of least leverage, and least looked at in its piece of text, leaves.

    Compactor (Chari and Van Durme 2025, https://arxiv.org/abs/2507.08143), see
    `kvlab.cache.leverage.Compactor`. sketch: dims; piece: tokens; blend: weight of the leverage.
    """

    name = "compactor"
    by_token: object = "compactor"

    def __init__(self, sketch: int = 48, piece: int = 256, blend: float = 0.35, seed: int = 0):
        super().__init__()
        check_number("policy.sketch", sketch)
        check_number("policy.piece", piece)
        check_number("policy.blend", blend, 0, whole=False)
        self.sketch, self.piece, self.blend = sketch, piece, blend
        self.seed = seed = checked_seed("policy.seed", seed)
        self.by_token = "compactor", {"sketch": sketch, "piece": piece, "blend": blend,
                                      "seed": seed}  # fmt: skip


class RKV(ScoredTokens):
    """The token that is looked at least, and says what others say, leaves while decoding.

    R-KV (Cai et al. 2025, https://arxiv.org/abs/2505.24133), see `kvlab.cache.redundancy.RKV`.
    mix: weight of importance against redundancy; alike: cosine from which a key repeats another.
    """

    name = "rkv"
    by_token: object = "rkv"

    def __init__(self, mix: float = 0.1, alike: float = 0.5):
        super().__init__()
        check_number("policy.mix", mix, 0, 1, whole=False)
        check_number("policy.alike", alike, -1, 1, whole=False)
        self.mix, self.alike = mix, alike
        self.by_token = "rkv", {"mix": mix, "alike": alike}
