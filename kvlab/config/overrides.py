"""Override strings: split, parsed, refused where their form is wrong, layered."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from kvlab.config.signature import show
from kvlab.core import BadInput


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


def with_list_of_tasks(strings: Sequence[str]) -> list[str]:
    """`task=[a,b]` says what `tasks=[a,b]` says: a group has one option, a job several tasks."""
    return [f"tasks={s.removeprefix('task=')}" if s.startswith("task=[") else s for s in strings]


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
