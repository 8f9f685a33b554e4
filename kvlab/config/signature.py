"""Values of the configuration held against the signature of the class they are meant for."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import lru_cache
from math import isnan
from typing import Any, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kvlab.kinds import annotations, describe

__all__ = ["describe", "did_you_mean", "fits", "parameters", "show"]


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`did you mean X? known: ...`, or only the known ones where nothing is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}known: {', '.join(sorted(known)) or 'none'}"


def show(value: object) -> object:
    """A value as a user writes it in yaml, a section by its class."""
    if isinstance(value, dict) and "_target_" in value:
        return value["_target_"]
    return json.dumps(value) if value is None or isinstance(value, bool) else value


def parameters(target: Callable) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """The parameters a yaml may set, and their annotations."""
    owner = target.__init__ if isinstance(target, type) else target
    hints = annotations(target) | annotations(owner)  # a dataclass has them on the class
    return dict(inspect.signature(target).parameters), hints


def fits(value: object, hint: Any) -> bool:
    """Whether a resolved configuration value may be passed where `hint` is annotated: strictly, as
    JSON, which has lists only. A section with a `_target_` fits anywhere: it is built later."""
    if isinstance(value, dict) and "_target_" in value:
        return True
    if isinstance(value, list):
        value = [v for v in value if not (isinstance(v, dict) and "_target_" in v)]
    if isinstance(value, float) and isnan(value):  # nobody means it, and it passes comparisons
        return False
    try:
        _adapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError:
        return False
    return True


@lru_cache(None)
def _adapter(hint: Any) -> TypeAdapter:
    if get_origin(hint) is Iterable:  # a text is iterable too, and never meant
        hint = list[get_args(hint)]
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
