"""conf/policy and conf/window mirror the classes: one file each, every parameter, its default."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from kvlab import axes, policy

CONF = Path(__file__).parents[2] / "conf"
POLICIES = {name: axes.find("policy", name) for name in policy.names()}
CASES = [("policy", *pair) for pair in POLICIES.items()]
CASES += [("window", *pair) for pair in ((n, axes.find("window", n)) for n in axes.names("window"))]


def read(group: str, name: str) -> dict:
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text())


@pytest.mark.parametrize(("group", "name", "cls"), CASES)
def test_yaml_mirrors_the_class(group, name, cls):
    found = read(group, name)
    module, _, target = found.pop("_target_").rpartition(".")
    assert getattr(import_module(module), target) is cls
    assert found.pop("_partial_", False) is (group == "policy")
    parameters = inspect.signature(cls).parameters.values()
    defaults = {p.name: p.default for p in parameters}
    assert found == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}


@pytest.mark.parametrize("group", ["policy", "window"])
def test_no_yaml_without_a_class(group):
    files = {path.stem for path in (CONF / group).glob("*.yaml")}
    assert files == {name for g, name, _ in CASES if g == group}


def test_every_public_policy_has_a_name():
    bases = {policy.EvictionPolicy, policy.PriorityPolicy, policy.BlockMeta, policy.Moment}
    exported = {getattr(policy, name) for name in policy.__all__}
    classes = {cls for cls in exported if isinstance(cls, type)} - bases
    assert classes == set(POLICIES.values())
