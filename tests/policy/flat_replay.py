"""Flat accounting of a trace, written as plainly as can be."""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path

import kvlab
from kvlab.blocks import BlockLedger

TRACES = Path(kvlab.__file__).parent / "assets" / "traces"


@cache
def accesses(trace: str) -> list[int]:
    """All block ids of a bundled trace, such as "mooncake_synthetic", in file order."""
    with lzma.open(TRACES / f"{trace}.jsonl.xz", "rt") as lines:
        return [content for line in lines for content in json.loads(line).get("hash_ids", ())]


def replay(contents: list[int], ledger: BlockLedger) -> int:
    """Hits when each content is looked up on its own, and admitted if it is not there."""
    where: dict[int, int] = {}
    hits = 0
    for content in contents:
        block = where.get(content)
        if block is not None:
            ledger.touch((block,))
            hits += 1
            continue
        (block,), gone = ledger.admit((content,))
        where[content] = block
        for old in gone:
            del where[old]
    return hits
