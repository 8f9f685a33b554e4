"""Record the hits of libcachesim on the bundled traces, as the table that our policies must meet.

    python tests/data/make_libcachesim_table.py

Needs `pip install libcachesim`. Every block id of a trace in file order is one access to an object
of size 1 (flat accounting). hashpower=18 only sizes libcachesim's hash table. Writes
libcachesim_hits.json beside this file.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import libcachesim

TRACES = Path(__file__).parents[2] / "kvlab" / "assets" / "traces"

CAPACITIES = [1000, 5000, 10_000, 30_000]
POLICIES = {
    "lru": "LRU",
    "fifo": "FIFO",
    "lfu": "LFU",
    "sieve": "Sieve",
    "arc": "ARC",
    "s3fifo": "S3FIFO",
    "mq": "MQ",
    "belady": "Belady",
}
NEVER = 2**62  # libcachesim's Belady wants a next use for each request, and this for none


def read(path: Path) -> list[int]:
    """All block ids in file order."""
    with lzma.open(path, "rt") as lines:
        return [content for line in lines for content in json.loads(line).get("hash_ids", ())]


def requests_of(accesses: list[int]) -> list[libcachesim.Request]:
    """One request per access, with the position of its next use."""
    requests, following = [], {}
    for position in range(len(accesses) - 1, -1, -1):
        content = accesses[position]
        following_use = following.get(content, NEVER)
        request = libcachesim.Request(obj_id=content, obj_size=1)
        request.next_access_vtime = following_use
        requests.append(request)
        following[content] = position
    return requests[::-1]


def hits(policy: str, capacity: int, requests: list[libcachesim.Request]) -> int:
    cache = getattr(libcachesim, POLICIES[policy])(cache_size=capacity, hashpower=18)
    return sum(cache.get(request) for request in requests)


def table(path: Path) -> dict:
    accesses = read(path)
    requests = requests_of(accesses)
    rows = {p: {str(c): hits(p, c, requests) for c in CAPACITIES} for p in POLICIES}
    return {"accesses": len(accesses), "hits": rows}


def main():
    traces = {path.name.split(".")[0]: table(path) for path in sorted(TRACES.glob("*.xz"))}
    found = {"libcachesim": libcachesim.__version__, "traces": traces}
    out = Path(__file__).with_name("libcachesim_hits.json")
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
