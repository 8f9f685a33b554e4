"""Override strings: split, parsed, refused where their form is wrong, layered, named."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from kvlab.axes import AXES, load
from kvlab.config.signature import show
from kvlab.core import BadInput

_BUDGETS = {
    "cache.budget_percent": "{}%",
    "cache.budget_blocks": "{} blocks",
    "cache.budget_bytes": "{} bytes",
}


def parse(strings: Sequence[str]) -> list[Override]:
    """Parsed overrides. Raises `BadInput` for what is not `key=value`, adds or deletes a key."""
    parser = OverridesParser.create()
    overrides = []
    for string in strings:
        try:
            overrides += parser.parse_overrides([string])
        except OverrideParseException:
            raise BadInput("argument", string, "write key=value, for example format=int4") from None
    for override in overrides:
        if not override.is_hydra_override():
            _refuse_form(override)
    return overrides


def _refuse_form(override: Override) -> None:
    key, value = override.get_key_element().lstrip("+~"), show(override.value())
    if override.is_delete():
        raise BadInput(f"~{key}", value, f"nothing can be left out; {key}=... changes it")
    if override.is_add() or override.is_force_add():
        remedy = f"no key can be added; {key}={value} without + sets one that exists"
        raise BadInput(f"+{key}", value, remedy)
    if override.is_sweep_override():
        remedy = "are several values: --multirun makes a run of each, [a,b] is a list"
        raise BadInput(key, override.get_value_string(), remedy)


def quote(value: str) -> str:
    """A value that Hydra's grammar takes as it stands."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def first_of_sweep(strings: Sequence[str]) -> list[str]:
    """The overrides of a sweep's first job, to be checked before any job runs.

    Intervals and globs belong to their sweeper; the job is checked without them.
    """
    chosen = []
    for string in strings:
        if "=" not in string:
            return list(strings)  # parse says what is wrong with it
        [override] = OverridesParser.create().parse_overrides([string])
        if override.is_choice_sweep() or override.is_range_sweep():
            key = override.get_key_element()
            chosen.append(f"{key}={next(iter(override.sweep_string_iterator()))}")
        elif not override.is_sweep_override():
            chosen.append(string)
    return chosen


def split(variant: str) -> list[Override]:
    """The overrides in one entry of `variants`: `format=int8 policy=lru`."""
    if not isinstance(variant, str):
        raise BadInput("variants", variant, 'each entry is a text such as "format=int4 policy=lru"')
    try:
        words = shlex.split(variant)
    except ValueError as error:
        raise BadInput("variants", variant, f"cannot be split into overrides: {error}") from None
    return parse(words)


def layer(*layers: Iterable[Override]) -> dict[str, Override]:
    """Overrides by key; a later layer replaces what an earlier one says of the same key."""
    chosen: dict[str, Override] = {}
    for override in (o for part in layers for o in part):
        chosen[override.get_key_element()] = override
    return chosen


def label(settings: dict[str, object]) -> str:
    """A short readable name: `int8 lru 10%`; keys that no axis names stay `key=value`."""
    return " ".join(_word(key, value) for key, value in settings.items())


def of_members(settings: dict[str, object]) -> dict[str, object]:
    """A member given by its class, `policy._target_=my_module.MyPolicy`, in place of the option
    that it was laid over: what a variant is called after and what its rows say."""
    paths = {axis: settings.get(f"{axis}._target_") for axis in AXES}
    found = {}
    for key, value in settings.items():
        path = paths.get(key.removesuffix("._target_"))
        if path is None:
            found[key] = value
        else:
            axis = key.removesuffix("._target_")
            found[axis] = member_name(axis, str(path))
    return found


def member_name(axis: str, path: str) -> str:
    """The short name of the class at a dotted path, or the path of a class that has none."""
    return getattr(load(axis, path), "name", None) or path


def _word(key: str, value: object) -> str:
    if key in AXES:
        return f"no {key}" if value in ("none", None) else str(value)
    if key in _BUDGETS and value is not None:
        return _BUDGETS[key].format(value)
    return f"{key}={value}"
