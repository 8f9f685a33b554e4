"""Arguments held against the annotations of what takes them: the wrong kind is one sentence.

The command line checks what a yaml says before anything is built (`kvlab/config`). Whoever writes
Python has the same classes, and `middle="false"` would be true there. A number is not a truth, a
truth is no number, NaN is neither, a text is no list; what cannot be told fits.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from math import isnan
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from kvlab.core import BadInput

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
          type(None): "null", Path: "a path"}  # fmt: skip
_UNIONS = (Union, types.UnionType)
_OPEN_ENDED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_SHOWN = 60  # characters of a refused value


def members(axis: str) -> Callable[[type], type]:
    """Marks the root of an axis' members: its constructor and those of all below it, a user's own
    too, take what they annotate. A refusal's key is `AXIS.ARGUMENT`.
    """
    def marked(root: type) -> type:
        own = root.__dict__.get("__init_subclass__")

        def __init_subclass__(cls, **rest):
            if own is None:
                super(root, cls).__init_subclass__(**rest)
            else:
                own.__func__(cls, **rest)
            hold(cls)

        def hold(cls):
            if "__init__" in cls.__dict__:
                cls.__init__ = held(axis)(cls.__init__)

        root.__init_subclass__ = classmethod(__init_subclass__)
        hold(root)
        return root

    return marked


def held(section: str = "") -> Callable[[Callable], Callable]:
    """Marks a function or constructor: it raises `BadInput` for arguments of the wrong kind.

    section: what the key of a refusal begins with. Their defaults fit always.
    """
    def marked(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @wraps(function)
        def checked(*args, **given):
            check(function, signature, args, given, section)
            return function(*args, **given)

        return checked

    return marked


def check(
    function: Callable, signature: inspect.Signature, args: tuple, given: dict, section: str
) -> None:
    """Raises `BadInput` for an argument of the wrong kind; of a call with too many, or one unknown,
    Python says so itself."""
    try:
        bound = signature.bind_partial(*args, **given).arguments
    except TypeError:
        return
    hints = _hints_of(function)
    for name, value in bound.items():
        parameter = signature.parameters[name]
        if name not in hints or parameter.kind in _OPEN_ENDED or value is parameter.default:
            continue
        if not fits(value, hints[name]):
            key = f"{section}.{name}" if section else name
            raise BadInput(key, shown(value), f"must be {describe(hints[name])}")


def annotations(scope: object) -> dict[str, Any]:
    """What a function or class annotates; a name imported for type checkers only stands for
    anything."""
    unknown: dict[str, Any] = {}
    while True:
        try:
            return get_type_hints(scope, localns=unknown)
        except NameError as error:
            unknown[error.name] = Any
        except (TypeError, AttributeError):
            return {}


_hints_of = lru_cache(None)(annotations)


def fits(value: object, hint: Any) -> bool:
    """Whether a Python value may be passed where `hint` is annotated."""
    if hint in _SIMPLE:
        return _SIMPLE[hint](value)
    origin, args = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    kind = origin or hint
    if kind in (Sequence, list, tuple):
        return _is_list(value) and _entries_fit(value, kind, args)
    if kind is Iterable:  # it may be walked once, so its entries are not looked at
        return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    if kind is Callable:
        return callable(value)
    try:
        return isinstance(value, Mapping if kind is dict else kind)
    except TypeError:  # what cannot be asked: Any, a type variable, a protocol
        return True


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _entries_fit(value: Sequence, kind: type, args: tuple) -> bool:
    unlike = kind is tuple and args[-1:] != (Ellipsis,)  # an annotation for each entry
    if unlike:
        return not args or len(value) == len(args) and all(map(fits, value, args))
    return not args or all(fits(entry, args[0]) for entry in value)


def _is_number(value: object, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    return isinstance(value, Integral) or not isnan(value)


_SIMPLE: dict[Any, Callable[[object], bool]] = {
    bool: lambda value: isinstance(value, (bool, np.bool_)),
    int: lambda value: _is_number(value, Integral),
    float: lambda value: _is_number(value, Real),
    str: lambda value: isinstance(value, str),
    Path: lambda value: isinstance(value, (str, Path)),
    type(None): lambda value: value is None,
    Any: lambda value: True,
}


def shown(value: object) -> str:
    """A refused value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def describe(hint: Any) -> str:
    """An annotation in a reader's words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return " or ".join(dict.fromkeys(describe(arg) for arg in args))
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if isinstance(origin, type) and (issubclass(list, origin) or origin is tuple):
        return "a list" + (f" with each entry {describe(args[0])}" if args else "")
    if hint in _WORDS:
        return _WORDS[hint]
    name = getattr(hint, "__name__", str(hint))
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
