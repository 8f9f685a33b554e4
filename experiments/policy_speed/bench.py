"""Block accesses per second of policy and ledger objects, libcachesim beside them.

    python experiments/policy_speed/bench.py [TRACE.jsonl] [--policies lru ...] [--capacity N ...]

Flat accounting: every block id of the trace in file order, each block on its own. CPU time, best of
`--repeats` runs, since other work on the machine only ever slows a run down.
"""

from __future__ import annotations

import argparse
import json
import lzma
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


def best(run, repeats, *arguments):
    results = [run(*arguments) for _ in range(repeats)]
    return results[0][0], min(seconds for _, seconds in results)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, nargs="?", default=TRACE)
    parser.add_argument("--policies", nargs="+", default=["lru", "fifo", "lfu", "s3fifo"])
    parser.add_argument("--capacity", nargs="+", type=int, default=[1000, 10_000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    requests = read(options.trace)
    accesses = sum(map(len, requests))
    print(f"{'policy':8}{'blocks':>8}{'hits':>9}{'M/s':>7}   libcachesim get(): hits, M/s")
    for name in options.policies:
        for capacity in options.capacity:
            hits, seconds = best(ours, options.repeats, requests, name, capacity)
            line = f"{name:8}{capacity:8}{hits:9}{accesses / seconds / 1e6:7.2f}"
            if name in PEERS:
                peer_hits, seconds = best(theirs, options.repeats, requests, name, capacity)
                line += f"   {peer_hits:9}{accesses / seconds / 1e6:7.2f}"
            print(line)


if __name__ == "__main__":
    main()
