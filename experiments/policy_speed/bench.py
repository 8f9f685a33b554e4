"""Block accesses per second of policy and ledger objects, libcachesim beside them.

    python experiments/policy_speed/bench.py [TRACE.jsonl] [--policies lru ...] [--capacity N ...]

Flat accounting: every block id of the trace in file order, each block on its own. CPU time, best of
`--rounds` runs, since other work on the machine only ever slows a run down.
"""

from __future__ import annotations

import argparse
import json
import lzma
from itertools import product
from pathlib import Path
from time import process_time

import kvlab
from kvlab.blocks import BlockLedger
from kvlab.policy import by_name

TRACE = Path(kvlab.__file__).parent / "assets" / "traces" / "mooncake_conversation.jsonl.xz"
PEERS = {
    "lru": "LRU",
    "fifo": "FIFO",
    "lfu": "LFU",
    "s3fifo": "S3FIFO",
    "sieve": "Sieve",
    "arc": "ARC",
    "mq": "MQ",
}


def read(path: Path) -> list[list[int]]:
    """Block ids of each request."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt") as lines:
        return [ids for line in lines if (ids := json.loads(line).get("hash_ids"))]


def replay(requests: list[list[int]], ledger: BlockLedger) -> int:
    """Hits of flat accounting; runs of hits and of misses go to the ledger in one call each."""
    at: dict[int, int] = {}  # content -> block
    hits = 0
    for contents in requests:
        start, end = 0, len(contents)
        while start < end:
            run = start
            if contents[run] in at:
                while run < end and contents[run] in at:
                    run += 1
                hits += run - start
                ledger.touch([at[content] for content in contents[start:run]])
            else:
                fresh = {}
                while run < end and contents[run] not in at and contents[run] not in fresh:
                    fresh[contents[run]] = None
                    run += 1
                ids, gone = ledger.admit(list(fresh))
                at.update(zip(fresh, ids))
                for content in gone:
                    del at[content]
            start = run
    return hits


def ours(requests, name, capacity):
    ledger = BlockLedger(capacity, by_name(name))
    start = process_time()
    hits = replay(requests, ledger)
    return hits, process_time() - start


def theirs(requests, name, capacity):
    """libcachesim's get(), called for each block from Python."""
    import libcachesim

    cache = getattr(libcachesim, PEERS[name])(cache_size=capacity, hashpower=18)
    wanted = [libcachesim.Request(obj_id=i, obj_size=1) for ids in requests for i in ids]
    get = cache.get
    start = process_time()
    hits = sum(get(request) for request in wanted)
    return hits, process_time() - start


def measure(requests, cells: list[tuple[str, int]], rounds: int) -> dict:
    """(policy, capacity, runner) -> hits and least seconds.

    Rounds go over all cells: a busy minute of the machine spoils a round of each, not one cell.
    """
    found = {}
    for _ in range(rounds):
        for name, capacity in cells:
            for run in (ours, theirs) if name in PEERS else (ours,):
                hits, seconds = run(requests, name, capacity)
                least = found.get((name, capacity, run), (0, seconds))[1]
                found[name, capacity, run] = hits, min(least, seconds)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, nargs="?", default=TRACE)
    parser.add_argument("--policies", nargs="+", default=["lru", "fifo", "lfu", "s3fifo"])
    parser.add_argument("--capacity", nargs="+", type=int, default=[1000, 5000, 10_000, 30_000])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    requests = read(options.trace)
    accesses = sum(map(len, requests))
    cells = list(product(options.policies, options.capacity))
    found = measure(requests, cells, options.rounds)
    print("| policy | blocks | hits | M/s | hits of libcachesim | its M/s |")
    print("|---|---|---|---|---|---|")
    for name, capacity in cells:
        both = [found.get((name, capacity, run)) for run in (ours, theirs)]
        figures = [f"{hits} | {accesses / s / 1e6:.2f}" for hits, s in filter(None, both)]
        print(f"| {name} | {capacity} | " + " | ".join(figures) + " |")


if __name__ == "__main__":
    main()
