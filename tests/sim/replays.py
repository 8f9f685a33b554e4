"""Replays that were recorded once, digest by digest: what a faster way of replaying must give.

`python tests/sim/replays.py > tests/sim/replays.json` records them anew, for a change of results
that is wanted.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator

import numpy as np

from kvlab.policy import asked, names
from kvlab.sim import CostModel, Host, Trace, from_requests, simulate

MODES = ("exclusive", "write_back", "write_through")
RANKED = "attention_mass"  # stands for all that go by scores: no trace has any, so all order alike


def traces() -> dict[str, Trace]:
    """Sessions over shared prompts, some longer than the cache, with partial ends; and ids in any
    order, repeated within a request."""
    return {"sessions": _sessions(random.Random(1)), "heap": _heap(random.Random(2))}


def _sessions(draw: random.Random) -> Trace:
    prompts = [[*range(1000 * n, 1000 * n + draw.randint(1, 12))] for n in range(6)]
    sessions = [list(draw.choice(prompts)) for _ in range(40)]
    rows, fresh, columns = [], 10**6, {"session": [], "tool": []}
    for at in range(400):
        session = draw.randrange(len(sessions))
        ids = sessions[session]
        ids += range(fresh, fresh + draw.randint(0, 5))
        fresh += 5
        if draw.random() < 0.2:
            sessions[session] = list(draw.choice(prompts))
        rows.append((700.0 * at, 4 * len(ids) - (ids[-1] % 3 == 0), draw.randint(1, 6), list(ids)))
        columns["session"].append(session)
        columns["tool"].append(draw.randint(0, 1))
    made = from_requests(rows, 4, "sessions")
    made.columns.update({name: np.array(column) for name, column in columns.items()})
    return made


def _heap(draw: random.Random) -> Trace:
    rows = [(40.0 * at, 0, 2, [draw.randint(0, 60) for _ in range(draw.randint(1, 12))])
            for at in range(300)]
    rows = [(ms, 4 * len(ids) - draw.randint(0, 3), out, ids) for ms, _, out, ids in rows]
    made = from_requests(rows, 4, "heap")
    made.columns.update(session=np.arange(300) % 7, tool=np.arange(300) % 2)
    return made


def cases() -> Iterator[tuple[str, Trace, dict]]:
    """(name, trace, arguments of `simulate`)."""
    for name, trace in traces().items():
        for policy in names():
            kind = asked(policy)
            if policy == "none" or (name == "heap" and kind.foresees):
                continue  # the future of ids that follow different ones says little
            if kind.scored and policy != RANKED:
                continue
            for capacity in (24, 90):
                given = {"policy": policy, "capacity_blocks": capacity}
                yield f"{name} {policy} {capacity}", trace, given
        for policy in ("lru", "lfu", "arc", "s3fifo", "leaf_first", "gdsf"):
            given = {"policy": policy, "capacity_blocks": 40, "partial_blocks": "miss"}
            yield f"{name} {policy} partial", trace, given
            for mode in MODES:
                host = Host(30, mode=mode)
                yield f"{name} {policy} {mode}", trace, {**given, "host": host}
            behind = Host(20, "fifo", behind=Host(50, mode="write_back"))
            yield f"{name} {policy} behind", trace, {**given, "host": behind}
            flat = {"policy": policy, "capacity_blocks": 40, "prefix": False}
            yield f"{name} {policy} flat", trace, flat
            cost = CostModel(chunk_tokens=None)
            served = {"capacity_blocks": 90, "service": cost, "host": Host(60)}
            if name == "sessions":
                yield f"{name} {policy} service", trace, {"policy": policy, **served}


def digest(trace: Trace, given: dict) -> str:
    """Of the outcome of each access, the contents that left in order, when, and the sums."""
    told = hashlib.sha256()

    def add(piece, outcome):
        for part in (outcome.code, outcome.evicted, outcome.evicted_at):
            told.update(np.asarray(part).astype("<i8").tobytes())

    result = simulate(trace, outcomes=add, **given)
    counts = (result.block_hits, result.evictions, result.orphans, sorted(result.tiers.items()))
    told.update(repr(counts).encode())
    return told.hexdigest()[:16]


def main() -> None:
    found = {name: digest(trace, given) for name, trace, given in cases()}
    print(json.dumps(found, indent=0))


if __name__ == "__main__":
    main()
