"""Replays by the policy objects, beside a bare LRU of the same process.

    python experiments/replay_speed/objects.py [POLICY ...]

Prefix-correct, conversation trace, 10,000 blocks; best of five rounds of CPU time each.
"""

from __future__ import annotations

import os
import sys
from time import process_time

from kvlab.sim import load_trace, simulate
from kvlab.sim.speed import bare

CAPACITY, ROUNDS = 10_000, 5


def seconds(trace, policy: str) -> float:
    began = process_time()
    simulate(trace, policy, CAPACITY)
    return process_time() - began


def main() -> None:
    trace = load_trace("conversation")
    ids, million = trace.ids.tolist(), trace.accesses / 1e6
    for policy in sys.argv[1:] or ["lru", "lfu", "s3fifo", "arc"]:
        rounds = [(seconds(trace, policy), bare(ids, CAPACITY)) for _ in range(ROUNDS)]
        mine, least = map(min, zip(*rounds))
        print(
            f"{policy}: {million / mine:.3f} M/s, bare LRU {million / least:.2f} M/s, "
            f"{mine / least:.1f} times as long; load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    main()
