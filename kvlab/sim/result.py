"""The result of a simulation: counts, the rates that follow from them, and measurement rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvlab.core import Measurement
from kvlab.sim.outcome import SHARE, Tally


@dataclass
class SimResult:
    """What a policy did with a trace.

    Counts are in blocks unless the name says otherwise, and of what `Definitions` count.
    `any_hit_requests`: with at least one hit; `request_hit_shares`: sum over requests of the share
    of their blocks that hit. `token_hits` and `flops_saved` are of the
    prompt; `misses` by class: compulsory (never asked before), capacity, partial_block (resident,
    but partial blocks do not hit), broken_chain (resident behind a gap), refused (of requests
    larger than the cache). `host_hits`, `deep_hits`: by the tier that had the block, included in
    `block_hits`; `tiers`: blocks written to and dropped by each. `orphans`: resident at the end but
    unreachable; None where not known.
    """

    policy: str
    capacity_blocks: int
    block_size: int
    requests: int
    refused_requests: int
    block_accesses: int
    block_hits: int
    tokens: int
    token_hits: int
    flops: float
    flops_saved: float
    evictions: int
    misses: dict[str, int]
    seconds: float
    thrashed: int | None = None
    any_hit_requests: int = 0
    request_hit_shares: float = 0.0
    host_hits: int = 0
    deep_hits: int = 0
    host_evictions: int = 0
    orphans: int | None = None
    service: dict[str, float] = field(default_factory=dict)
    tiers: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, tally: Tally, policy: str, capacity: int, block_size: int, **more) -> SimResult:
        known = tally.first_ms is not None
        return cls(
            policy=policy,
            capacity_blocks=capacity,
            block_size=block_size,
            requests=tally.requests,
            refused_requests=tally.refused,
            block_accesses=tally.accesses,
            block_hits=tally.hits,
            tokens=tally.tokens,
            token_hits=tally.token_hits,
            flops=tally.flops,
            flops_saved=tally.flops_saved,
            evictions=tally.evictions,
            misses=tally.misses,
            seconds=(tally.last_ms - tally.first_ms) / 1e3 if known else 0.0,
            thrashed=None if tally.window_ms is None else tally.thrashed,
            any_hit_requests=tally.any_hit,
            request_hit_shares=tally.hit_shares / SHARE,
            host_hits=tally.host_hits,
            deep_hits=tally.deep_hits,
            **more,
        )

    @property
    def device_hits(self) -> int:
        return self.block_hits - self.host_hits - self.deep_hits

    @property
    def block_hit_percent(self) -> float:
        return _percent(self.block_hits, self.block_accesses)

    @property
    def token_hit_percent(self) -> float:
        return _percent(self.token_hits, self.tokens)

    @property
    def request_any_hit_percent(self) -> float:
        """Share of the requests of which at least one block hit."""
        return _percent(self.any_hit_requests, self.requests)

    @property
    def request_mean_hit_percent(self) -> float:
        """Mean over requests of the share of a request's blocks that hit."""
        return _percent(self.request_hit_shares, self.requests)

    @property
    def flops_saved_percent(self) -> float:
        """Share of the prefill FLOPs that hits save (later tokens cost more: attention)."""
        return _percent(self.flops_saved, self.flops)

    @property
    def evictions_per_second(self) -> float:
        """Per second of the trace's own time; 0 if it has none."""
        return self.evictions / self.seconds if self.seconds else 0.0

    @property
    def thrash_percent(self) -> float | None:
        """Share of evictions whose block was wanted again within the window."""
        return None if self.thrashed is None else _percent(self.thrashed, self.evictions)

    def _of_requests(self, name: str) -> Measurement:
        return Measurement(name, getattr(self, name), "%", "higher", count=self.requests)

    def measurements(self) -> list[Measurement]:
        """Rows for a run folder, named as in the contract of a run."""
        count = self.block_accesses
        rows = [
            Measurement("block_hit_percent", self.block_hit_percent, "%", "higher", count=count),
            Measurement("token_hit_percent", self.token_hit_percent, "%", "higher", count=count),
            self._of_requests("request_any_hit_percent"),
            self._of_requests("request_mean_hit_percent"),
            Measurement("flops_saved_percent", self.flops_saved_percent, "%", "higher"),
            Measurement("evictions", self.evictions, "blocks", "lower"),
            Measurement("evictions_per_second", self.evictions_per_second, "blocks/s", "lower"),
            Measurement("refused_requests", self.refused_requests, "requests", "lower"),
        ]
        rows += [
            Measurement(f"miss_{name}_percent", _percent(misses, count), "%", "lower")
            for name, misses in self.misses.items()
        ]
        if self.thrashed is not None:
            rows.append(Measurement("thrash_percent", self.thrash_percent, "%", "lower"))
        if self.host_hits:
            share = _percent(self.host_hits, count)
            rows.append(Measurement("host_hit_percent", share, "%", "higher"))
        if self.deep_hits:
            share = _percent(self.deep_hits, count)
            rows.append(Measurement("third_hit_percent", share, "%", "higher"))
        rows += [Measurement(name, value, "blocks", "lower") for name, value in self.tiers.items()]
        if self.orphans is not None:
            rows.append(Measurement("orphans", self.orphans, "blocks", "lower"))
        rows += [Measurement(name, value, *_told(name)) for name, value in self.service.items()]
        return rows


def _percent(part: float, whole: float) -> float:
    return 100.0 * part / whole if whole else 0.0


_UNITS = (  # of service measurements by the end of their names: unit, and which way is better
    ("_tokens_per_second", "tokens/s", "higher"), ("_per_second", "1/s", "higher"),
    ("_percent", "%", None), ("dollars_per_million_tokens", "$", "lower"),
    ("joules_per_million_tokens", "J", "lower"), ("_ms", "ms", "lower"), ("_seconds", "s", "lower"),
    ("_requests", "requests", "lower"), ("_blocks", "blocks", "lower"),
)  # fmt: skip


def _told(name: str) -> tuple[str, str | None]:
    return next((unit, better) for end, unit, better in _UNITS if name.endswith(end))
