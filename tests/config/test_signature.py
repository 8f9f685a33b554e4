"""Values of a yaml against annotations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from kvlab.config.signature import describe, did_you_mean, fits, parameters, show

NODE = {"_target_": "kvlab.window.NoWindow"}


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int), (3, float), (3.5, float), (True, bool), ("x", str), (None, int | None),
        ("a", Literal["a", "b"]), ([1, 2], list[int]), ([], list[int]), ([1], tuple[int, ...]),
        (["a"], Iterable[str]), ([1, "a"], list[int | str]), ([1, "a"], tuple[int, str]),
        (NODE, Callable), (NODE, object), (NODE, int), ({"a": 1}, dict[str, int]),
        ({"a": 1}, Mapping[str, int]), ("x", Path), (3, Any), ([1], Any), ([1], Sequence[int]),
        ("int8", str | Callable), ([NODE], list[Callable]),
    ],
)  # fmt: skip
def test_fits(value, hint):
    assert fits(value, hint)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("3", int), (3.0, int), (True, int), (False, float), (1, bool), (None, int), (3, str),
        ("c", Literal["a", "b"]), (["a"], list[int]), (3, list[int]), ("ab", list[str]),
        ("ab", Iterable[str]), ([1], int), ({"a": 1}, int), ("x", Callable), (3, Path),
    ],
)  # fmt: skip
def test_does_not_fit(value, hint):
    assert not fits(value, hint)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or null"),
        (Literal["a", "b"], "one of a, b"),
        (list[str], "a list with each entry a text"),
        (Iterable[int], "a list with each entry a whole number"),
    ],
)
def test_describe(hint, words):
    assert describe(hint) == words


@dataclass
class Sized:
    size: int = 3


class Checked:
    def __init__(self, size: int, other: Missing = None):  # noqa: F821 -- as behind TYPE_CHECKING
        pass


def test_parameters_of_dataclasses_and_unresolvable_hints():
    assert parameters(Sized)[1]["size"] is int
    assert list(parameters(Checked)[0]) == ["size", "other"]
    assert parameters(Checked)[1] == {"size": int, "other": Any}


def test_words():
    assert did_you_mean("int5", ["int4", "fp8"]) == "did you mean int4? known: fp8, int4"
    assert did_you_mean("zzz", []) == "known: none"
    assert [show(v) for v in (None, True, 3, NODE)] == ["null", "true", 3, "kvlab.window.NoWindow"]
