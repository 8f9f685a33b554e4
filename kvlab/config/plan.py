"""From override strings to a plan: everything is checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from kvlab.axes import label, of_members
from kvlab.config.build import build, check, check_call, target_of
from kvlab.config.compose import compose, refuse_strays
from kvlab.config.overrides import layer, parse, split
from kvlab.config.signature import show
from kvlab.config.sweep import launcher
from kvlab.config.tree import is_used, reachable
from kvlab.core import BadInput, Variant
from kvlab.launch import Launching
from kvlab.track import Place

# Read by __main__ itself; every other key on the command line must reach the job.
OWN_KEYS = ("seed", "device", "resume", "variants", "experiment", "job", "track")


class RunSettings(NamedTuple):
    """The keys that belong to no axis: they steer the run itself."""

    seed: int  # of every generator
    device: Literal["auto", "cpu", "cuda"]
    resume: bool
    variants: list[str]

    @classmethod
    def read(cls, tree: dict) -> RunSettings:
        """From the top level of the configuration. Raises `BadInput` for a wrong value."""
        given = {name: tree[name] for name in cls._fields}
        check_call(cls, given)
        if not 0 <= given["seed"] < 2**32:
            raise BadInput("seed", given["seed"], "must lie between 0 and 2**32 - 1")
        return cls(**given)


class Plan(NamedTuple):
    """A run that passed every check that needs no model."""

    config: dict            # composed and resolved
    settings: RunSettings
    job: object             # has run(folder, variants)
    variants: list[Variant]
    tracker: object
    experiment: str | None
    place: Place
    launcher: Launching | None = None  # who does the jobs of a sweep; None: Hydra, here


class _Composed(NamedTuple):
    """One composition: `tree` with its interpolations standing, `resolved` without."""

    tree: dict
    resolved: dict
    choices: dict
    hydra: DictConfig

    def build(self, root: str) -> object:
        """What the node `root` says, checked."""
        check(self.tree, self.resolved[root], root)
        return build(self.tree, self.resolved[root], root)


class _Point(NamedTuple):
    name: str
    params: dict
    strings: list[str]


def make_plan(
    strings: Sequence[str], config_name: str = "config", folder: Literal["run", "sweep"] = "run",
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compose, refuse, instantiate, expand the variants. Hydra must be initialised.

    folder: whose place is looked at, that of one run or that of a sweep. tell: hears what is about
    to run as soon as it is known, before libraries are loaded that take seconds.
    Raises `KvlabError`, mostly `BadInput`, for anything that the user got wrong.
    """
    base, given = _composed(strings, config_name, tasks=True), parse(strings)
    settings = RunSettings.read(base.tree)
    tell(_about(base, settings, {o.key_or_group for o in given}))
    wants_specs = getattr(target_of(base.tree, "job"), "wants_specs", False)
    if not wants_specs and not {o.key_or_group for o in given} & {"variants", "experiment"}:
        # a job that takes no variants gets none from the experiment that nobody chose
        base.tree["variants"] = base.resolved["variants"] = []
        settings = settings._replace(variants=[])
        base.choices["experiment"] = None
    spec_keys = reachable(base.tree, ["spec"]) if wants_specs else set()
    _refuse_unused(given, reachable(base.tree, ["job"]) | spec_keys, base)
    for root in ("job", "track"):
        check(base.tree, base.resolved[root], root)
    points = []
    if wants_specs or settings.variants:
        points = expand(given, settings.variants, spec_keys, base.choices)
    specs = [_composed(point.strings, config_name).build("spec") if wants_specs else None
             for point in points]  # fmt: skip
    named = OmegaConf.to_container(base.hydra[folder], resolve=False)["dir"]
    return Plan(
        config=base.resolved,
        settings=settings,
        job=base.build("job"),
        variants=[_variant(p, spec) for p, spec in zip(points, specs)],
        tracker=base.build("track"),
        experiment=base.choices.get("experiment"),
        place=Place.at(Path(base.hydra[folder].dir), named),  # the other need not be resolvable
        launcher=launcher(base.hydra, folder == "sweep"),
    )


def _about(base: _Composed, settings: RunSettings, given: set[str]) -> str:
    """`experiment=quickstart, job=evaluate, 5 variants`; for a job that was given alone nothing of
    an experiment, which it may not take."""
    chosen = "job" not in given or bool(given & {"experiment", "variants"})
    words = [f"{group}={base.choices[group]}" for group in ("experiment", "job")[1 - chosen :]
             if base.choices.get(group) not in (None, "none")]  # fmt: skip
    if chosen and (count := len(settings.variants)):
        words.append(f"{count} variants" if count > 1 else "1 variant")
    return ", ".join(words)


def built(strings: Sequence[str], root: str) -> object:
    """What the node `root` of a composition says, alone. Hydra must be initialised."""
    return _composed(strings, "config").build(root)


def _variant(point: _Point, spec) -> Variant:
    """A variant named after what it is: a method run otherwise than published says so."""
    granularity = getattr(spec, "granularity", "")
    name = f"{point.name} {granularity}" if granularity else point.name
    about = {"granularity": granularity.strip("()")} if granularity else {}
    about |= {"caution": spec.caution} if getattr(spec, "caution", "") else {}
    return Variant(name, point.params | about, spec)


def _composed(strings: Sequence[str], config_name: str, tasks: bool = False) -> _Composed:
    """tasks: whether the job's list of them is looked up; caches do not need it."""
    config = compose(strings, config_name)
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    ours = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    if tasks:
        _look_up_tasks(ours, strings, config_name)
    tree = OmegaConf.to_container(ours, resolve=False)
    refuse_strays(tree, choices)
    resolved = OmegaConf.to_container(ours, resolve=True, throw_on_missing=False)
    return _Composed(tree, resolved, choices, config.hydra)


def _look_up_tasks(config: DictConfig, strings: Sequence[str], config_name: str) -> None:
    """Names in the list of tasks become the options of the group, with the settings of this run."""
    listed = OmegaConf.to_container(config, resolve=False).get("tasks")
    known = GlobalHydra.instance().config_loader().get_group_options("task")
    search = [o.input_line for o in parse(strings) if o.key_or_group == "hydra.searchpath"]
    for number, task in enumerate(listed if isinstance(listed, list) else []):
        if task in known:
            chosen = compose([*search, "experiment=none", f"task={task}"], config_name)
            config.tasks[number] = chosen.task


def _refuse_unused(given: list, used: set[str], base: _Composed) -> None:
    """A setting that the job never reads would be silently ignored: say so instead."""
    for override in given:
        key = override.key_or_group
        own = override.is_hydra_override() or key.partition(".")[0] in OWN_KEYS
        if not own and not is_used(key, used):
            job = base.choices.get("job")
            remedy = f"job={job} does not use it; leave it out or choose another experiment"
            raise BadInput(key, show(override.value()), remedy)


def expand(given: list, variants: Sequence[str], spec_keys: set[str], choices: dict) -> list:
    """One point for each entry of `variants`; without any, one for the run's own settings.

    given: the parsed command line. A variant is composed on top of it. Where the variants come from
    an experiment's yaml, the command line wins over them: it is the more deliberate word. Equal
    points are merged.
    """
    run = [o for o in given if o.key_or_group != "variants"]
    by_user = len(run) < len(given)
    points: dict[str, _Point] = {}
    for text in variants or [""]:
        own = split(text)
        _refuse_outside(own, spec_keys)
        chosen = layer(run, own) if by_user else layer(own, run)
        shared = [o for o in run if is_used(o.key_or_group, spec_keys)]
        settings = {key: chosen[key].value() for key in layer(own, shared)}
        params = of_members(settings) or {"format": choices.get("format")}
        name = label(of_members({key: settings[key] for key in layer(own)}) or params)
        points[name] = _Point(name, params, [o.input_line for o in chosen.values()])
    return list(points.values())


def _refuse_outside(own: list, spec_keys: set[str]) -> None:
    for override in own:
        # by group: a key may exist only under the option that the same variant chooses
        if spec_keys and not is_used(override.key_or_group.partition(".")[0], spec_keys):
            remedy = "a variant can change the cache and its axes only; set this for the whole run"
            raise BadInput(f"variants: {override.key_or_group}", show(override.value()), remedy)
