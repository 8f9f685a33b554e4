"""Flat hit counts against a table recorded with libcachesim (tests/data)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flat_replay import accesses, replay

from kvlab.blocks import BlockLedger
from kvlab.policy import by_name

TABLE = json.loads((Path(__file__).parents[1] / "data" / "libcachesim_hits.json").read_text())

# Difference allowed, in parts of all accesses. S3-FIFO: libcachesim looks into its ghosts before it
# makes room, we after, so that the ghost of what comes in may just have been forgotten.
TOLERANCE = {"arc": 0.001, "s3fifo": 0.01, "mq": 0.01}

# Every other capacity of a trace, the others of the next one.
CASES = [
    (trace, policy, int(capacity))
    for number, (trace, found) in enumerate(TABLE["traces"].items())
    for policy, hits in found["hits"].items()
    for capacity in sorted(hits, key=int)[number % 2 :: 2]
]


@pytest.mark.parametrize(("trace", "policy", "capacity"), CASES)
def test_hits(trace, policy, capacity):
    contents = accesses(trace)
    found = TABLE["traces"][trace]
    assert len(contents) == found["accesses"]
    parameters = {"future": contents} if policy == "belady" else {}
    hits = replay(contents, BlockLedger(capacity, by_name(policy, **parameters)))
    allowed = TOLERANCE.get(policy, 0) * len(contents)
    assert abs(hits - found["hits"][policy][str(capacity)]) <= allowed
