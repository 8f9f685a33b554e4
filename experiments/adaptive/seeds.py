"""How far the adaptive policy stays behind the best fixed one on made traces of other seeds.

    python experiments/adaptive/seeds.py 4 5 6 7 --memory 4 --patience 0.05

Points of block hits, compiled; needs numba.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from kvlab.policy import Adaptive
from kvlab.sim import Trace, simulate
from kvlab.sim.workloads import agents, chats

FIXED = ("fifo", "lru", "lfu", "sieve", "s3fifo", "arc", "mq", "gdsf", "pgdsf")


def points(seed: int) -> Iterator[tuple[str, Trace, int]]:
    """(name, trace, capacity)."""
    made = (
        ("agents", agents(800, seed=seed), (1000, 2000, 3000, 4000, 6000)),
        ("chats", chats(1500, seed=seed), (500, 1500, 4000)),
        ("many agents", agents(1500, agents=40, steps=6, seed=seed), (3000, 6000)),
    )
    for name, trace, capacities in made:
        for capacity in capacities:
            yield f"{name} {seed} at {capacity}", trace, capacity


def percent(trace: Trace, policy, capacity: int) -> float:
    done = simulate(trace, policy, capacity, compiled=True, window_seconds=None)
    return done.block_hit_percent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--memory", type=float, default=Adaptive().memory)
    parser.add_argument("--patience", type=float, default=Adaptive().patience)
    given = parser.parse_args()
    behind = {}
    for seed in given.seeds:
        for name, trace, capacity in points(seed):
            best = max(percent(trace, policy, capacity) for policy in FIXED)
            judged = Adaptive(memory=given.memory, patience=given.patience)
            behind[name] = best - percent(trace, judged, capacity)
            print(f"{name}: {behind[name]:.2f} points behind {best:.2f} %")
    found = np.array(list(behind.values()))
    worst = max(behind, key=behind.get)
    print(
        f"mean {found.mean():.2f}, median {np.median(found):.2f}, over two points "
        f"{(found > 2).sum()} of {len(found)}, worst {found.max():.2f} ({worst})"
    )


if __name__ == "__main__":
    main()
