"""conf/ mirrors the constructors: every yaml builds and is whole, no class lacks one."""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from kvlab import axes
from kvlab.config import conf_dir, make_plan
from kvlab.config.build import build, check
from kvlab.config.compose import compose
from kvlab.config.signature import parameters
from kvlab.config.tree import leaves
from kvlab.core import BadInput

CONF = conf_dir()
DATA = Path(__file__).parent / "data"
OPTIONS = sorted(
    f"{file.parent.relative_to(CONF)}={file.stem}"
    for file in CONF.glob("*/*.yaml")
    if file.parent.name not in ("experiment", "job", "launcher")
)
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
# What a user has to give; any value shows that the rest composes.
MANDATORY = {
    "model=local": ["model.path=x"],
    "model=gguf": ["model.path=x"],
    "data=text": ["data.path=x"],
    "policy=triattention": [f"policy.centres={DATA}/centres.json"],
    "budget=shares": ["budget.shares=[1]"],
    "budget=duo": ["budget.gates=[[1,0]]"],
    "task=qa_1": [f"eval.squad={DATA}/squad.json"],
    "task=qa_2": [f"eval.hotpotqa={DATA}/hotpot.json"],
    "trace=file": ["trace.path=conversation"],  # traces are read when they are built
}
# Where the public classes of a group live, and what marks them as members: a verb, or for an axis
# the root class of the member that changes nothing.
GROUPS = {
    "model": ("kvlab.model.load", "load"),
    "data": ("kvlab.eval.data", "documents"),
    "track": ("kvlab.track", "history"),
    "needle": ("kvlab.eval.needle", "prompt"),
    "task": ("kvlab.eval", "awaited"),
}
BASES = {"Source", "EvictionPolicy", "PriorityPolicy", "RunFolder", "Retrieval", "Summary",
         "ByHead", "Asking", "Forced", "StepTask", "TimedTask"}


@pytest.fixture(scope="module", autouse=True)
def initialised():
    with hydra.initialize_config_dir(str(CONF), job_name="kvlab", version_base="1.3"):
        yield


@cache
def load(option: str) -> dict:
    group, _, name = option.partition("=")
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"), resolve=False)


def nodes(content: object) -> list[dict]:
    """Every section with a `_target_`, the outermost first."""
    return [v for _, v in leaves(content, "") if isinstance(v, dict) and "_target_" in v]


def target(node: dict):
    module, _, name = node["_target_"].rpartition(".")
    return getattr(import_module(module), name)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_yaml_composes_and_builds(option):
    group = option.partition("=")[0]
    config = compose([option, "experiment=none", *MANDATORY.get(option, [])])
    tree = OmegaConf.to_container(config, resolve=False)
    resolved = OmegaConf.to_container(config[group], resolve=True)
    check(tree, resolved, group)
    if option in ("policy=belady", "policy=learned"):
        with pytest.raises(BadInput, match="only replays have"):
            build(tree, resolved, group)
    elif "_target_" in resolved:
        assert build(tree, resolved, group) is not None


@pytest.mark.parametrize("option", OPTIONS)
def test_every_yaml_lists_every_parameter(option):
    for node in nodes(load(option)):
        known, _ = parameters(target(node))
        given = {key for key in node if not key.startswith("_")} - {"defaults"}
        given |= set(axes.AXES) if option.startswith("cache=") else set()  # by /cache_axes
        open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        assert given == {name for name, p in known.items() if p.kind not in open_ended}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_class_with_one_yaml_has_its_own_defaults_in_it(option):
    content = load(option)
    shared = [other for other in OPTIONS if load(other).get("_target_") == content.get("_target_")]
    if "_target_" not in content or len(shared) > 1:
        pytest.skip("no class, or several yamls that differ on purpose")
    for name, parameter in parameters(target(content))[0].items():
        value, default = content.get(name), parameter.default
        if isinstance(value, (str, dict)) and (isinstance(value, dict) or value.startswith("${")):
            continue  # another group decides
        if value == "???":
            continue  # must be given
        if option.startswith("cache=") and name in axes.AXES:
            continue
        if default is not inspect.Parameter.empty:
            assert value == (list(default) if isinstance(default, tuple) else default), name


def members(group: str) -> set[str]:
    """Names of the public classes that belong to a group."""
    if group in GROUPS:
        module, verb = GROUPS[group]
        return {name for name, value in vars(import_module(module)).items()
                if inspect.isclass(value) and hasattr(value, verb)}  # fmt: skip
    null = axes.find(group, axes.TABLE[group].null)
    room, root = import_module(".".join(null.__module__.split(".")[:2])), null.__mro__[-2]
    return {name for name, value in vars(room).items()
            if inspect.isclass(value) and issubclass(value, root)}  # fmt: skip


@pytest.mark.parametrize("group", [*GROUPS, *(a for a in axes.AXES if a != "format")])
def test_every_public_class_of_a_group_has_a_yaml(group):
    named = {node["_target_"].rpartition(".")[2] for o in OPTIONS for node in nodes(load(o))}
    public = {name for name in members(group) if not name.startswith("_")}
    assert public and public - BASES <= named


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_makes_a_plan(name, tmp_path):
    plan = make_plan([f"experiment={name}", f"hydra.run.dir={tmp_path / 'run'}"])
    assert plan.experiment == name and callable(plan.job.run)
    assert not list(Path(tmp_path).iterdir())
