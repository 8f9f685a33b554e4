"""Values of the configuration held against the signature of the class they are meant for."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
    Path: "a path",
}


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`did you mean X? known: ...`, or only the known ones where nothing is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}known: {', '.join(sorted(known)) or 'none'}"


def show(value: object) -> object:
    """A value as a user writes it in yaml, a section by its class."""
    if isinstance(value, dict) and "_target_" in value:
        return value["_target_"]
    return {None: "null", True: "true", False: "false"}[value] if _is_word(value) else value


def _is_word(value: object) -> bool:
    return value is None or isinstance(value, bool)


def parameters(target: Callable) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """The parameters a yaml may set, and their annotations."""
    params = inspect.signature(target).parameters
    owner = target.__init__ if isinstance(target, type) else target
    return dict(params), _hints(target) | _hints(owner)  # a dataclass has them on the class


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
    """Whether a resolved configuration value may be passed where `hint` is annotated."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if isinstance(value, Mapping):
        return "_target_" in value or _is_open(hint) or _is_mapping(origin or hint)
    if isinstance(value, list):
        return _fits_list(value, origin or hint, args)
    return _fits_scalar(value, origin or hint)


def _fits_list(value: list, kind: Any, args: tuple) -> bool:
    if _is_open(kind):
        return True
    if not _takes_list(kind):
        return False
    items = [arg for arg in args if arg is not Ellipsis]
    return all(fits(item, items[0]) for item in value) if len(items) == 1 else True


def _takes_list(kind: Any) -> bool:
    """`Iterable`, `Sequence`, `list` and also `tuple`: yaml has only lists."""
    return isinstance(kind, type) and (issubclass(list, kind) or kind is tuple)


def _fits_scalar(value: object, kind: Any) -> bool:
    if _is_open(kind):
        return True
    if isinstance(value, bool) or value is None:
        return kind is type(value) or kind is None and value is None
    if kind is float:
        return isinstance(value, (int, float))
    if kind is Path:
        return isinstance(value, str)
    if kind is not str and _takes_list(kind):
        return False  # a text is iterable too, and never meant
    return isinstance(kind, type) and isinstance(value, kind)


def _is_open(hint: Any) -> bool:
    return hint is Any or hint is object or hint is inspect.Parameter.empty


def _is_mapping(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Mapping)


def describe(hint: Any) -> str:
    """An annotation in a reader's words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(arg) for arg in args))
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if _takes_list(origin):
        return "a list" + (f" with each entry {describe(args[0])}" if args else "")
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")
