"""The smallest program that still fails: fewer operations, then plainer ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from .machine import failure
from .programs import Forward, Generate, Program

PLAINER = {"tokens": (1, 2, 3, 5), "new": (1, 2), "rows": (1, 2), "mask": ("none", "ones", "left"),
           "how": ("greedy",), "workspace": (16384,), "model": ("llama",)}  # fmt: skip


def shrunk(program: Program, tries: int = 80) -> Program:
    """Greedily, with at most `tries` runs."""
    kind = failure(program).kind
    while True:
        for candidate in plainer(program):
            tries -= 1
            if tries < 0:
                return program
            verdict = failure(candidate)
            if verdict is not None and verdict.kind == kind:
                program = candidate
                break
        else:
            return program


def plainer(program: Program) -> Iterator[Program]:
    """Programs with one thing less."""
    for i in reversed(range(len(program.ops))):
        yield replace(program, ops=program.ops[:i] + program.ops[i + 1 :])
    for setup in simpler(program.setup):
        yield replace(program, setup=setup)
    for i, op in enumerate(program.ops):
        for other in simpler(op):
            yield replace(program, ops=program.ops[:i] + (other,) + program.ops[i + 1 :])
        if isinstance(op, Generate):
            forward = Forward(op.slot, op.tokens, op.rows, op.seed, op.mask)
            yield replace(program, ops=program.ops[:i] + (forward,) + program.ops[i + 1 :])


def simpler(item) -> Iterator:
    """`item` with one field nearer to its default."""
    plain = type(item)()
    for field in fields(item):
        value, usual = getattr(item, field.name), getattr(plain, field.name)
        if value == usual:
            continue
        yield replace(item, **{field.name: usual})
        steps = PLAINER.get(field.name, ())
        if field.name == "how" and not isinstance(item, Generate):
            continue
        if value in steps:
            steps = steps[: steps.index(value)]
        elif isinstance(value, int) and not isinstance(value, bool):
            steps = [s for s in steps if s < value]
        for other in steps:
            if other != usual:
                yield replace(item, **{field.name: other})
