"""From override strings to a plan: everything is checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from omegaconf import DictConfig, OmegaConf

from kvlab.config.build import build, check, target_of
from kvlab.config.compose import compose, refuse_strays
from kvlab.config.overrides import label, layer, of_members, parse, split
from kvlab.config.place import Place
from kvlab.config.settings import RunSettings
from kvlab.config.signature import show
from kvlab.config.tree import is_used, reachable
from kvlab.core import BadInput, Variant

# Read by __main__ itself; every other key on the command line must reach the job.
OWN_KEYS = ("seed", "device", "resume", "variants", "experiment", "job", "track")


class Plan(NamedTuple):
    """A run that passed every check that needs no model."""

    config: dict            # composed and resolved
    settings: RunSettings
    job: object             # has run(folder, variants)
    variants: list[Variant]
    tracker: object
    experiment: str | None
    place: Place


class _Composed(NamedTuple):
    """One composition: `tree` with its interpolations standing, `resolved` without."""

    tree: dict
    resolved: dict
    choices: dict
    hydra: DictConfig

    def place(self, key: str) -> Place:
        """Of `run` or `sweep`; only the one that is used need be resolvable."""
        named = OmegaConf.to_container(self.hydra[key], resolve=False)["dir"]
        return Place.at(Path(self.hydra[key].dir), named)


def make_plan(
    strings: Sequence[str], config_name: str = "config", folder: Literal["run", "sweep"] = "run"
) -> Plan:
    """Compose, refuse, instantiate, expand the variants. Hydra must be initialised.

    folder: whose place is looked at, that of one run or that of a sweep.
    Raises `KvlabError`, mostly `BadInput`, for anything that the user got wrong.
    """
    base = _composed(strings, config_name)
    settings = RunSettings.read(base.tree)
    wants_specs = getattr(target_of(base.tree, "job"), "wants_specs", False)
    if not wants_specs and not _chosen(strings):
        base = _without_variants(base)
        settings = RunSettings.read(base.tree)
    spec_keys = reachable(base.tree, ["spec"]) if wants_specs else set()
    _refuse_unused(strings, reachable(base.tree, ["job"]) | spec_keys, base)
    for root in ("job", "track"):
        target_of(base.tree, root)
        check(base.tree, base.resolved[root], root)
    points = []
    if wants_specs or settings.variants:
        points = expand(strings, settings.variants, spec_keys, base.choices)
    specs = [_spec(point, spec_keys, config_name) if wants_specs else None for point in points]
    return Plan(
        config=base.resolved,
        settings=settings,
        job=build(base.tree, base.resolved["job"], "job"),
        variants=[Variant(p.name, p.params, spec) for p, spec in zip(points, specs)],
        tracker=build(base.tree, base.resolved["track"], "track"),
        experiment=base.choices.get("experiment"),
        place=base.place(folder),
    )


def _chosen(strings: Sequence[str]) -> bool:
    """Whether the user named variants or an experiment."""
    return any(o.key_or_group in ("variants", "experiment") for o in parse(strings))


def _without_variants(base: _Composed) -> _Composed:
    """A job that takes no variants gets none from the experiment that nobody chose."""
    empty = {"variants": []}
    choices = base.choices | {"experiment": None}
    return base._replace(tree=base.tree | empty, resolved=base.resolved | empty, choices=choices)


def _composed(strings: Sequence[str], config_name: str) -> _Composed:
    config = compose(strings, config_name)
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    tree = OmegaConf.to_container(config, resolve=False)
    del tree["hydra"]
    refuse_strays(tree, choices)
    return _Composed(tree, _resolved(config), choices, config.hydra)


def _resolved(config: DictConfig) -> dict:
    keys = [key for key in config if key != "hydra"]
    part = OmegaConf.masked_copy(config, keys)
    return OmegaConf.to_container(part, resolve=True, throw_on_missing=False)


def _refuse_unused(strings: Sequence[str], used: set[str], base: _Composed) -> None:
    """A setting that the job never reads would be silently ignored: say so instead."""
    for override in parse(strings):
        key = override.key_or_group
        if override.is_hydra_override() or key.partition(".")[0] in OWN_KEYS:
            continue
        if not is_used(key, used):
            job = base.choices.get("job")
            remedy = f"job={job} does not use it; leave it out or choose another experiment"
            raise BadInput(key, show(override.value()), remedy)


class _Point(NamedTuple):
    name: str
    params: dict
    strings: list[str]


def expand(
    strings: Sequence[str], variants: Sequence[str], spec_keys: set[str], choices: dict
) -> list[_Point]:
    """One point for each entry of `variants`; without any, one for the run's own settings.

    A variant is composed on top of the run. Where the variants come from an experiment's yaml,
    the command line wins over them: it is the more deliberate word. Equal points are merged.
    """
    run = [o for o in parse(strings) if o.key_or_group != "variants"]
    listed_by_user = len(run) < len(strings)
    points: dict[str, _Point] = {}
    for text in variants or [""]:
        own = split(text)
        _refuse_outside(own, spec_keys)
        chosen = layer(run, own) if listed_by_user else layer(own, run)
        shared = [o for o in run if is_used(o.key_or_group, spec_keys)]
        settings = {key: chosen[key].value() for key in layer(own, shared)}
        params = of_members(settings)
        named = of_members({key: settings[key] for key in layer(own)}) or params
        name = label(named or {"format": choices.get("format")})
        points[name] = _Point(name, params or {"format": choices.get("format")},
                              [o.input_line for o in chosen.values()])
    return list(points.values())


def _refuse_outside(own: list, spec_keys: set[str]) -> None:
    for override in own:
        # by group: a key may exist only under the option that the same variant chooses
        group = override.key_or_group.partition(".")[0]
        if spec_keys and not is_used(group, spec_keys):
            remedy = "a variant can change the cache and its axes only; set this for the whole run"
            raise BadInput(f"variants: {override.key_or_group}", show(override.value()), remedy)


def _spec(point: _Point, spec_keys: set[str], config_name: str) -> object:
    composed = _composed(point.strings, config_name)
    check(composed.tree, composed.resolved["spec"], "spec")
    return build(composed.tree, composed.resolved["spec"], "spec")
