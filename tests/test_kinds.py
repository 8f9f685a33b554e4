"""Arguments of the wrong kind, in Python: one sentence that names the key, for every member."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf, nan
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest

from kvlab import axes
from kvlab.blocks import HashSharing
from kvlab.core import BadInput, KvlabError
from kvlab.kinds import describe, fits, held, shown
from kvlab.policy import EvictionPolicy
from kvlab.window import SinkWindow

ODD = ("x", "", True, False, nan, inf, None, 0, -1, -0.5, 1.5, 3, 1e30, 10**30, [], [0], ["x"],
       [None], [[0.5]], {}, {"a": 1}, object(), int, 1 + 2j, np.int64(3), np.array([1, 2]),
       b"x")  # fmt: skip


@pytest.mark.parametrize("axis", axes.TABLE)
def test_no_member_answers_with_a_traceback(axis):
    """Every setting of every member, each odd value: made, or refused in one short line."""
    for name, member in axes.TABLE[axis].members.items():
        made = axes.find(axis, name)
        for key, parameter in inspect.signature(made).parameters.items():
            if key in member.given or parameter.kind is parameter.VAR_KEYWORD:
                continue
            for value in ODD:
                try:
                    made(**{key: value})
                except KvlabError as error:
                    assert "\n" not in str(error) and len(str(error)) < 400, error
                except TypeError as error:  # of a call that lacks an argument
                    assert "missing" in str(error), (name, key, value)


@pytest.mark.parametrize(("value", "hint"), [
    (3, int), (np.int64(3), int), (10**400, int), (3, float), (np.float32(3), float), (inf, float),
    (True, bool), (np.True_, bool), ("x", str), (None, int | None), ("x", Path), (Path("x"), Path),
    ((1, 2), list[int]), ([1], Sequence[int]), (range(3), Sequence[int]), ([1, 2], tuple[int, ...]),
    ((1, "x"), tuple[int, str]), (iter([1]), Iterable[int]), (len, Callable), ({}, dict[str, int]),
    ({}, Mapping), ("a", Literal["a"]), (object(), Any), (object(), object), (3, Sequence | int),
])  # fmt: skip
def test_what_fits(value, hint):
    assert fits(value, hint)


@pytest.mark.parametrize(("value", "hint"), [
    (True, int), (3.0, int), ("3", int), (nan, float), (False, float), (1, bool), ("false", bool),
    (3, str), (b"x", str), (None, int), ("ab", list[str]), (["a"], list[int]), (3, Sequence[int]),
    ([1], tuple[int, str]), ("ab", Iterable[str]), ({}, Iterable[int]), (3, Callable),
    ([], dict), ("b", Literal["a"]), (True, Literal[1]), (3, EvictionPolicy), (np.nan, float),
])  # fmt: skip
def test_what_does_not(value, hint):
    assert not fits(value, hint)


def test_a_text_is_no_truth():
    """`middle="false"` was true, and `hold="no"` held."""
    for make, key in ((SinkWindow, "window.middle"), (HashSharing, "prefix.hold")):
        with pytest.raises(BadInput, match=f"{key}='false': must be true or false"):
            make(**{key.partition(".")[2]: "false"})


def test_members_of_ones_own_are_held_too():
    class Mine(SinkWindow):
        def __init__(self, share: float = 0.5, seed: int = None):  # noqa: RUF013
            super().__init__(recent=8)
            self.share = share

    assert Mine().share == 0.5 and Mine(1, None).share == 1  # a default fits always
    assert list(inspect.signature(Mine).parameters) == ["share", "seed"]
    with pytest.raises(BadInput, match="window.share='x': must be a number"):
        Mine("x")
    with pytest.raises(TypeError, match="unexpected keyword"):
        Mine(sare=1)


class Late(NamedTuple):
    at: int


def test_functions():
    @held("job")
    def run(rows: Sequence[int], *more: int, late: Late | None = None, name: NotThere = "x"):  # noqa: F821
        return rows, more, late, name

    assert run([1], "more", late=Late(1), name=3) == ([1], ("more",), Late(1), 3)
    for given in ({"rows": 3}, {"rows": [1], "late": 3}):
        with pytest.raises(BadInput, match=f"job.{list(given)[-1]}=3"):
            run(**given)
    assert describe(EvictionPolicy | None) == "an EvictionPolicy or null"
    assert len(shown("x" * 1000)) < 70 and "\n" not in shown(np.ones((9, 9)))


def test_futures():
    for name, future in (("learned", [0]), ("learned", [[[0]]]), ("belady", [[0]])):
        with pytest.raises(BadInput, match="future"):
            axes.by_name("policy", name, future=future)


@pytest.mark.parametrize("name", ["random", "shuffled", "compactor"])
def test_seeds(name):
    """-1 drew as 1 does, and NumPy's whole numbers were none."""
    axes.by_name("policy", name, seed=np.int64(3))
    for seed in (-1, 2**32):
        with pytest.raises(BadInput, match="policy.seed"):
            axes.by_name("policy", name, seed=seed)
