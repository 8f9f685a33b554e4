"""A few hundred steps of the adversary; `long_run` takes ten thousand."""

from __future__ import annotations

import pytest

from .long_run import failures, run, summary
from .machine import execute
from .programs import NO_CACHE, Crop, Forward, Generate, Program, Reorder, Reset, Setup

STEPS = 50


@pytest.mark.parametrize("seed", range(6))
def test_equal_or_refused(seed):
    count = run(STEPS, seed)
    assert not count.failures, "\n".join(failures(count, shrinks=3))
    assert count.kinds["equal"] > 0.6 * count.steps, "\n".join(summary(count))


ANSWERED = {
    "chunks": (Forward(tokens=5, rows=2), Forward(tokens=1), Forward(tokens=3)),
    "left padding": (Forward(tokens=5, rows=2, mask="left", positions="cumsum"),
                     Forward(tokens=1, mask="ones", positions="cumsum")),
    "generate": (Generate(rows=2, mask="left"), Generate(mask="ones")),
    "sampling": (Generate(rows=2, how="sample"),),
    "beams": (Generate(rows=2, how="beams"),),
    "prompt lookup": (Generate(how="lookup", tokens=12),),
    "assisted": (Generate(how="assisted"),),
    "in chunks": (Generate(tokens=7, rows=2, chunk=3),),
    "own driver": (Generate(rows=2, mask="left", how="own"), Generate(mask="left", how="own"),
                   Generate(how="own", driver="static")),
    "crop": (Forward(tokens=8), Crop(tokens=-3), Forward(tokens=2, seed=1)),
    "reorder": (Forward(rows=3), Reorder(seed=1), Forward(tokens=1)),
    "next request": (Generate(tokens=12), Reset(finish=True), Generate(tokens=12)),
    "no cache": (Forward(NO_CACHE, rows=2), Generate(NO_CACHE, rows=2)),
}  # fmt: skip


@pytest.mark.parametrize("cache", ["paged", "hash", "dynamic"])
@pytest.mark.parametrize("name", ANSWERED)
def test_what_must_be_answered_is_not_refused(name, cache):
    prefix = "hash" if cache == "hash" else "none"
    setup = Setup(cache="dynamic" if cache == "dynamic" else "paged", prefix=prefix)
    steps = execute(Program(setup, ANSWERED[name]))
    want = "skipped" if cache == "dynamic" and name == "own driver" else "equal"
    assert [step.verdict.kind for step in steps] == [want] * len(ANSWERED[name]), steps
