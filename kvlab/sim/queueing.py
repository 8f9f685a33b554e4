"""Times of requests in service: copies from the host, which delay nobody else, and the books."""

from __future__ import annotations

import numpy as np

from kvlab.sim.costs import CostModel
from kvlab.sim.pace import Event
from kvlab.sim.tiers import Host

GB = 1e9


class Link:
    """Copies from the tiers to the device. block_bytes: of one block in all layers."""

    def __init__(self, host: Host | None, cost: CostModel, block_bytes: float):
        levels = [host, host and host.behind]
        self.levels = [self._pace(level, cost, block_bytes) for level in levels]

    def _pace(self, host: Host | None, cost: CostModel, block_bytes: float) -> tuple[float, float]:
        """(latency in ms, ms a block) of one tier."""
        if host is None:
            return 0.0, 0.0
        latency, each = (0.0, 0.0) if cost.measures is None else cost.measures.to_device
        latency = latency if host.latency_ms is None else host.latency_ms
        if host.gigabytes_per_second is not None:
            each = 1e3 / (GB * host.gigabytes_per_second)
        return latency, each * block_bytes

    def ms(self, *blocks: int) -> float:
        """Of so many blocks of each tier, one tier after the other."""
        paces = zip(blocks, self.levels)
        return sum(latency + count * each for count, (latency, each) in paces if count)


class Books:
    """When each request began, had its first token and ended."""

    def __init__(self, cost: CostModel):
        self.cost = cost
        self.waits_ms: list[float] = []  # for room
        self.queue_ms: list[float] = []  # for a turn to be computed
        self.first_token_ms: list[float] = []
        self._tokens = [0, 0]  # prompt, output
        self._busy: list[tuple[float, float]] = []  # intervals of requests in service
        self._began = None

    def hear(self, event: Event) -> None:
        work = event.work
        if event.done:
            self._tokens[0] += work.prompt
            self._tokens[1] += work.output
            self._busy.append((work.began, event.ms))
            return
        self._began = work.arrival if self._began is None else min(self._began, work.arrival)
        self.waits_ms.append(work.began - work.arrival)
        self.queue_ms.append(event.queued_ms)
        self.first_token_ms.append(event.ms - work.arrival)

    def busy_seconds(self) -> float:
        """Seconds in which at least one request was in service."""
        total, until = 0.0, -np.inf
        for began, ended in sorted(self._busy):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total / 1e3

    def summary(self) -> dict[str, float]:
        waits, first = np.array(self.waits_ms or [0.0]), np.array(self.first_token_ms or [0.0])
        queue = np.array(self.queue_ms or [0.0])
        ends = max((ended for _, ended in self._busy), default=0.0)
        seconds = (ends - (self._began or 0.0)) / 1e3
        told = {
            "stalled_requests": int(np.count_nonzero(waits)),
            "stall_mean_ms": float(waits.mean()), "stall_max_ms": float(waits.max()),
            "ttft_ms": float(first.mean()), "ttft_p50_ms": float(np.percentile(first, 50)),
            "ttft_p90_ms": float(np.percentile(first, 90)),
            "ttft_p99_ms": float(np.percentile(first, 99)),
            "queue_mean_ms": float(queue.mean()), "makespan_seconds": seconds,
        }  # fmt: skip
        return told | (self._rates(seconds) if 0 < seconds < np.inf else {})

    def _rates(self, seconds: float) -> dict[str, float]:
        prompt, output = self._tokens
        rates = {
            "served_requests_per_second": len(self._busy) / seconds,
            "served_prompt_tokens_per_second": prompt / seconds,
            "served_output_tokens_per_second": output / seconds,
            "busy_percent": 100 * self.busy_seconds() / seconds,
        }
        million = (prompt + output) / 1e6
        if self.cost.dollars_per_hour is not None:
            spent = self.cost.dollars_per_hour * seconds / 3600
            rates["dollars_per_million_tokens"] = spent / million
        if self.cost.watts is not None:
            rates["joules_per_million_tokens"] = self.cost.watts * seconds / million
        return rates
