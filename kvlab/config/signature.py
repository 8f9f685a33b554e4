"""Values of the configuration held against the signature of the class they are meant for."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import lru_cache
from math import isnan
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
          type(None): "null", Path: "a path"}  # fmt: skip


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
    hints = _hints(target) | _hints(owner)  # a dataclass has them on the class
    return dict(inspect.signature(target).parameters), hints


def _hints(scope: object) -> dict[str, Any]:
    """Annotations; a name imported for type checkers only stands for anything."""
    unknown: dict[str, Any] = {}
    while True:
        try:
            return get_type_hints(scope, localns=unknown)
        except NameError as error:
            unknown[error.name] = Any
        except (TypeError, AttributeError):
            return {}


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


def describe(hint: Any) -> str:
    """An annotation in a reader's words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(arg) for arg in args))
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if isinstance(origin, type) and (issubclass(list, origin) or origin is tuple):
        return "a list" + (f" with each entry {describe(args[0])}" if args else "")
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")
