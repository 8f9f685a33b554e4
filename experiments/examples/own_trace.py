"""Requests of one's own as a trace: what could be shared, and what each policy makes of it.

    python experiments/examples/own_trace.py [chats.jsonl]        # with a name the trace is kept

A line of the file is a request: when it came (ms), tokens of its prompt and answer, and an id for
each block of the prompt; equal ids at equal places are equal text. Other formats are read as well,
text among them: docs/TRACES.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from kvlab.sim import hit_curve, load_trace, simulate

BLOCK = 16


def write(path: Path, users: int = 8, turns: int = 6) -> Path:
    """Chats that share a system prompt of 20 blocks; each turn comes behind all before it."""
    lines = [json.dumps({"block_size": BLOCK})]
    for turn in range(turns):
        for user in range(users):
            own = [1000 * (user + 1) + n for n in range(6 * (turn + 1))]
            ids = [*range(20), *own]
            lines.append(json.dumps({
                "timestamp": 1000 * (turn * users + user), "input_length": BLOCK * len(ids),
                "output_length": 32, "hash_ids": ids,
            }))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def told(path: Path, capacities=(60, 120, 240)) -> dict[tuple[str, int], float]:
    """(policy, blocks of room) -> percent of blocks that hit; `ideal` has room for all."""
    trace = load_trace(str(path))
    _, hits = hit_curve(trace)
    found = {("ideal", trace.accesses): 100 * int(hits[-1]) / trace.accesses}
    for policy in ("lru", "lfu", "arc", "belady"):
        for room in capacities:
            found[policy, room] = simulate(trace, policy, room).block_hit_percent
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(folder) / "chats.jsonl")
        for (policy, room), percent in told(write(path)).items():
            print(f"{policy:7} {room:5} blocks  {percent:5.1f} % of blocks hit")


if __name__ == "__main__":
    main()
