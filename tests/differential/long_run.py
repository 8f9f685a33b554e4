"""The long run: `python -m tests.differential.long_run --steps 10000 --seed 0 [--out counts.json]`.

Prints steps, what was equal, what was refused and with which sentence, and each kind of failure
with the shortest program that shows it. Exit status 1 where there is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")


class Count:
    """What a run came to."""

    def __init__(self):
        self.kinds, self.refusals, self.answers = Counter(), Counter(), Counter()
        self.library: Counter = Counter()
        self.failures: dict[str, list] = {}

    def add(self, program, steps) -> None:
        for op, verdict in steps:
            if verdict.kind == "skipped":
                continue
            self.kinds[verdict.kind] += 1
            self.answers[f"{label(op)}: {verdict.kind}"] += 1
            if verdict.kind == "refused":
                self.refusals[verdict.text] += 1
            if verdict.kind in ("library", "undefined"):
                self.library[verdict.text] += 1
            if verdict.failed:
                self.failures.setdefault(signature(program, op, verdict), []).append(program)

    @property
    def steps(self) -> int:
        return sum(self.kinds.values())


def label(op) -> str:
    """An operation by its name and what makes it special."""
    what = [getattr(op, name) for name in ("mask", "how") if getattr(op, name, None)]
    return " ".join([type(op).__name__, *map(str, what)]) if op is not None else "end"


def signature(program, op, verdict) -> str:
    """What makes two failures one of a kind."""
    from .compare import reason

    text = "" if verdict.kind == "differs" else reason(ValueError(verdict.text))[:70]
    cache = "a paged" if program.setup.cache == "paged" else "the library's"
    return f"{label(op)} on {cache} cache {verdict.kind} {text}".strip()


def run(steps: int, seed: int, kernels: str = "torch", seconds: float | None = None) -> Count:
    """Programs number 0, 1, ... of `seed` until `steps` operations ran."""
    from .machine import execute
    from .programs import draw

    count, number, started = Count(), 0, time.monotonic()
    while count.steps < steps and (seconds is None or time.monotonic() - started < seconds):
        program = draw(random.Random(f"{seed} {number}"), kernels)
        count.add(program, execute(program))
        number += 1
    return count


def summary(count: Count) -> Iterator[str]:
    """Steps by verdict, refusals and what the library raised by sentence."""
    yield f"steps {count.steps}: " + ", ".join(f"{k} {n}" for k, n in count.kinds.most_common())
    for title, counter in (("refused", count.refusals), ("the library itself", count.library)):
        yield from (f"{n:6} {title}: {text}" for text, n in counter.most_common())


def failures(count: Count, shrinks: int = 40) -> Iterator[str]:
    """Each kind of failure; the most frequent with the shortest program that shows it."""
    from .machine import failure
    from .shrink import shrunk

    most = sorted(count.failures.items(), key=lambda item: -len(item[1]))
    told: set[str] = set()
    for i, (text, programs) in enumerate(most):
        yield f"\nFAILED {len(programs)} times: {text}"
        if i < shrinks:
            small = shrunk(min(programs, key=lambda p: len(p.ops)))
            yield "the same as above" if str(small) in told else f"# {failure(small).text}\n{small}"
            told.add(str(small))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", default="torch", choices=("torch", "triton"))
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--shrinks", type=int, default=40)
    parser.add_argument("--out", type=Path, help="where the counts go, as JSON")
    options = parser.parse_args()
    if options.kernels == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    started = time.monotonic()
    count = run(options.steps, options.seed, options.kernels, options.seconds)
    for line in chain(summary(count), failures(count, options.shrinks)):
        print(line, flush=True)
    print(f"\n{time.monotonic() - started:.0f} s")
    if options.out:
        names = ("kinds", "refusals", "library", "answers")
        counts = {name: dict(getattr(count, name).most_common()) for name in names}
        options.out.write_text(json.dumps({"steps": count.steps} | counts, indent=1))
    return 1 if count.failures else 0


if __name__ == "__main__":
    sys.exit(main())
