"""A million random actions on the house of `house.py`, every book checked after each.

python tests/blocks/long_run.py [--steps 1000000] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from time import perf_counter

from house import House

from kvlab.policy import asked, names

POLICIES = [name for name in names() if name != "none" and not asked(name).foresees]
ACTIONS = ["open", "open", "write", "write", "write", "share", "share", "close", "truncate",
           "evict", "drop", "use", "use"]  # fmt: skip


def act(house: House, draw: random.Random) -> None:
    """One random action."""
    name, which = draw.choice(ACTIONS), draw.randrange(100)
    tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 7))]
    arguments = {
        "open": (tokens * 2, draw.random() < 0.6),
        "write": (which, tokens),
        "truncate": (which, draw.randrange(3)),
        "evict": (draw.randrange(4),),
        "use": (which, draw.random()),
    }
    getattr(house, name)(*arguments.get(name, (which,)))


def run(policy: str, steps: int, seed: int) -> Counter:
    """Steps on one house; how often each thing happened."""
    house, draw = House(policy), random.Random(seed)
    for step in range(steps):
        try:
            act(house, draw)
            house.check()
        except Exception as error:
            error.add_note(f"policy {policy}, seed {seed}, step {step}")
            raise
    return house.done


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = perf_counter()
    for policy in POLICIES:
        done = run(policy, options.steps // len(POLICIES), options.seed)
        print(f"{policy:15}{perf_counter() - start:7.0f} s  {dict(done)}", flush=True)


if __name__ == "__main__":
    main()
