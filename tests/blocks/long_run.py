"""A million random actions on the house of `house.py`, every book checked after each.

python tests/blocks/long_run.py [--steps 1000000] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from time import perf_counter

from house import KINDS, House

from kvlab.policy import asked, names

POLICIES = [name for name in names() if asked(name).evicts and not asked(name).foresees
            and not (asked(name).scored and asked(name).observes is None)]  # rank tokens only
ACTIONS = ["open", "open", "open", "write", "write", "write", "decode", "decode", "decode", "fork",
           "truncate", "close", "close", "keep", "attach", "release", "release", "evict", "drop",
           "renew", "use"]  # fmt: skip


def act(house: House, draw: random.Random) -> None:
    """One random action."""
    name, which = draw.choice(ACTIONS), draw.randrange(100)
    tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 7))]
    if name in ("drop", "renew") and draw.random() < 0.6:
        name = "open"
    arguments = {
        "open": (tokens * draw.randrange(1, 3), draw.choice((0, 0, 9))),
        "write": ([which, which + 1], [tokens, tokens], draw.choice(("commit", "abort", "fail"))),
        "decode": ([which], [tokens[:1]]),
        "fork": (which, draw.random() < 0.2),
        "truncate": (which, draw.randrange(99)),
        "keep": (which, draw.random() < 0.5),
        "attach": (tokens,),
        "evict": (draw.randrange(4),),
        "drop": (draw.random() < 0.7,),
        "renew": (),
    }
    verb = "write" if name == "decode" else name
    getattr(house, verb)(*arguments.get(name, (which,)))


def run(policy: str, kind: str, steps: int, seed: int) -> Counter:
    """Steps on one house; how often each thing happened."""
    draw = random.Random(seed)
    house = House(policy, kind, groups=1 + seed % 2, window=seed % 3 == 2 and kind != "exclusive")
    for step in range(steps):
        try:
            act(house, draw)
            house.check()
        except Exception as error:
            error.add_note(f"policy {policy}, {kind}, seed {seed}, step {step}")
            raise
    house.settle()
    return house.done


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, lives = perf_counter(), [(p, kind) for p in POLICIES for kind in KINDS]
    for policy, kind in lives:
        done = run(policy, kind, options.steps // len(lives), options.seed)
        print(f"{policy:15}{kind:15}{perf_counter() - start:7.0f} s  {dict(done)}", flush=True)


if __name__ == "__main__":
    main()
