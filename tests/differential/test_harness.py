"""The adversary itself: it finds planted faults, shrinks them, and blames nobody for nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from kvlab.cache import Running
from kvlab.core import BadInput
from kvlab.model import adapter

from . import masks, programs
from .compare import reason, refused
from .machine import Side, execute, failure
from .models import build
from .programs import Crop, Forward, Generate, Program, Reorder, Setup
from .shrink import shrunk


def drawn(seed: str, count: int):
    return [programs.draw(random.Random(f"{seed} {n}")) for n in range(count)]


def test_the_library_against_itself():
    """Eager and sdpa attention say the same: what differs here is a fault of the harness."""
    for program in drawn("self", 12):
        kind = "dynamic" if program.setup.cache == "paged" else program.setup.cache
        program = replace(program, setup=replace(program.setup, cache=kind))
        steps = execute(program, Side(program.setup, build(program.setup.model), kind))
        assert not [step for step in steps if step.verdict.failed or step.verdict.kind == "refused"]


PROGRAM = Program(Setup("mistral", block=8, prefix="none"), (
    Forward(tokens=8, rows=2, mask="left", positions="cumsum", hidden=True),
    Generate(tokens=3, rows=2, mask="ones"), Reorder(seed=3), Crop(tokens=-2),
    Forward(tokens=2, rows=2, seed=2, mask="ones", positions="cumsum", keep=1),
))  # fmt: skip


def late(monkeypatch):
    """Attention that is too warm."""
    attend = Running.attend
    monkeypatch.setattr(
        Running, "attend", lambda self, *a, scale, **k: attend(self, *a, scale=scale * 0.9, **k)
    )


def short(monkeypatch):
    """crop() that leaves one token too many."""
    crop = adapter.PagedCache.crop
    monkeypatch.setattr(adapter.PagedCache, "crop", lambda self, n: crop(self, int(n) + 1))


def still(monkeypatch):
    """reorder_cache() that does nothing."""
    monkeypatch.setattr(adapter.PagedCache, "reorder_cache", lambda self, index: None)


def wild(monkeypatch):
    """An error from inside instead of a sentence."""
    monkeypatch.setattr(adapter.PagedCache, "reorder_cache", lambda self, index: [][0])


@pytest.mark.parametrize(
    "plant, kind, last", [(late, "differs", Forward), (short, "state", Crop),
                          (still, "differs", Forward), (wild, "raised", Reorder)],
)  # fmt: skip
def test_a_planted_fault_is_found_and_shrunk(monkeypatch, plant, kind, last):
    assert failure(PROGRAM) is None
    plant(monkeypatch)
    assert failure(PROGRAM).kind == kind
    small = shrunk(PROGRAM, tries=60)
    assert failure(small).kind == kind
    assert len(small.ops) <= 3
    assert isinstance(small.ops[-1], last)
    assert small.setup == Setup()


def test_programs_print_as_python():
    for program in drawn("print", 20):
        assert eval(str(program), vars(programs)) == program
    assert drawn("print", 5) == drawn("print", 5)
    text = str(Program(Setup(block=8), (Forward(tokens=1), Crop())))
    assert text == "Program(Setup(block=8), (\n    Forward(tokens=1),\n    Crop(),\n))"


def test_only_what_our_own_code_says_is_a_refusal():
    try:
        raise BadInput("mask", 3, "must be a tensor")
    except BadInput as error:
        assert refused(error)
        assert reason(error) == "mask=N: must be a tensor"
    for wrong in (lambda: [][0], lambda: int("x"), lambda: masks.words(0, 1, 1).view(7)):
        with pytest.raises(Exception) as caught:
            wrong()
        assert not refused(caught.value)


def test_what_saw_nothing_is_not_compared():
    past = masks.Columns.empty(1)
    seen = torch.ones(1, 1, 4, 4).bool().tril() & torch.tensor([0, 1, 1, 1]).bool()
    assert masks.soundness(seen, past, {None}).tolist() == [[False, True, True, True]]
    sound = masks.soundness(seen, past, {None})
    seen_at_last = seen[:, 0, -1]
    after = past.then(torch.ones(1, 4).long(), seen_at_last, sound, seen_at_last, seen_at_last)
    all_seen = torch.ones(1, 1, 1, 5).bool()
    assert masks.soundness(all_seen, after, {None}).tolist() == [[False]], "it sees an unsound one"
    assert masks.soundness(all_seen, after, {2}).tolist() == [[True]], "the window hides that"
