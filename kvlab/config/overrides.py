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

_BUDGETS = {"cache.budget_percent": "{}%", "cache.budget_blocks": "{} blocks",
            "cache.budget_bytes": "{} bytes"}  # fmt: skip


def parse(strings: Sequence[str], sweep: bool = False) -> list[Override]:
    """Parsed overrides. Raises `BadInput` for what is not `key=value`, adds or deletes a key, or
    has several values in one run, no `sweep`."""
    parser = OverridesParser.create()
    overrides = []
    for string in strings:
        try:
            [override] = parser.parse_overrides([string])
        except OverrideParseException:
            raise BadInput("argument", string, "write key=value, for example format=int4") from None
        if not override.is_hydra_override():
            _refuse_form(override, sweep)
        overrides.append(override)
    return overrides


def _refuse_form(override: Override, sweep: bool) -> None:
    key = override.get_key_element().lstrip("+~")
    if override.is_delete():
        remedy = f"nothing can be left out; {key}=... changes it"
        raise BadInput(f"~{key}", show(override.value()), remedy)
    if override.is_add() or override.is_force_add():
        value = show(override.value())
        remedy = f"no key can be added; {key}={value} without + sets one that exists"
        raise BadInput(f"+{key}", value, remedy)
    if override.is_sweep_override() and not sweep:
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
    for override in parse(strings, sweep=True):
        if override.is_choice_sweep() or override.is_range_sweep():
            first = next(iter(override.sweep_string_iterator()))
            chosen.append(f"{override.get_key_element()}={first}")
        elif not override.is_sweep_override():
            chosen.append(override.input_line)
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
    return {override.get_key_element(): override for part in layers for override in part}


def label(settings: dict[str, object]) -> str:
    """A short readable name: `int8 lru 10%`; keys that no axis names stay `key=value`."""
    return " ".join(_word(key, value) for key, value in settings.items())


def _word(key: str, value: object) -> str:
    if key in AXES:
        return f"no {key}" if value in ("none", None) else str(value)
    if key in _BUDGETS and value is not None:
        return _BUDGETS[key].format(value)
    return f"{key}={value}"


def of_members(settings: dict[str, object]) -> dict[str, object]:
    """A member given by its class, `policy._target_=my_module.MyPolicy`, in place of the option
    that it was laid over, by its short name or, without one, by its path: what a variant is called
    after and what its rows say."""
    found = {}
    for key, value in settings.items():
        axis = key.removesuffix("._target_")
        path = settings.get(f"{axis}._target_") if axis in AXES else None
        if path is None:
            found[key] = value
        else:
            found[axis] = getattr(load(axis, str(path)), "name", None) or path
    return found
