"""A run says which of its packages nobody tested: in its environment and on stderr."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from kvlab.track import environment

ROOT = Path(__file__).resolve().parents[2]
PAIRED = ("torch", "transformers", "datasets", "hydra-core", "wandb")


@pytest.fixture
def world(monkeypatch):
    """`world(requires, installed)`: what the metadata says, and nothing said yet."""

    def put(requires, installed):
        monkeypatch.setattr(metadata, "requires", lambda name: requires)
        monkeypatch.setattr(metadata, "version", lambda name: found(installed, name))

    def found(installed, name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    environment.say_untested.cache_clear()
    yield put
    environment.say_untested.cache_clear()


RANGES = ["transformers>=5.17,<5.25", "torch>=2.11,<2.14", 'optuna>=4; extra == "search"']


@pytest.mark.parametrize(
    "installed, untested",
    [
        ({"transformers": "5.24.0", "torch": "2.13.0+cpu"}, {}),
        ({"transformers": "5.17.0", "torch": "2.11.0+cu130"}, {}),
        ({"transformers": "5.30.0", "torch": "2.13.1"}, {"transformers": "5.30.0"}),
        ({"transformers": "5.16.1", "torch": "2.14.0"},
         {"transformers": "5.16.1", "torch": "2.14.0"}),
        ({"transformers": "5.25.0.dev0"}, {"transformers": "5.25.0.dev0"}),
        ({"transformers": "5.24.0", "optuna": "3.0"}, {}),
    ],
)  # fmt: skip
def test_versions_outside_the_ranges(world, installed, untested, capsys):
    world(RANGES, installed)
    assert environment.untested_versions() == untested
    environment.say_untested()
    environment.say_untested()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(untested)
    for name, version in untested.items():
        assert f"{name} {version} (tested: " in said[0]


def test_a_run_records_them(world):
    facts = environment.collect("cpu")
    assert facts["untested_versions"] == environment.untested_versions()


def test_without_metadata_no_range_is_stated(world, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert environment.untested_versions() == {}


def bounds(requirement: Requirement, operator: str) -> list[str]:
    return [each.version for each in requirement.specifier if each.operator == operator]


def test_the_lowest_versions_are_the_ones_that_ci_installs():
    """.ci/lowest.txt pins the lower bound of each dependency, and nothing else states one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = {r.name: r for r in map(Requirement, project["dependencies"])}
    lines = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    pinned = {r.name: r for r in map(Requirement, filter(lambda x: x and x[0] != "#", lines))}
    assert pinned.keys() == stated.keys()
    for name, requirement in stated.items():
        (low,), (pin,) = bounds(requirement, ">="), bounds(pinned[name], "==")
        assert Version(low) == Version(pin), name
        assert name not in PAIRED or len(bounds(requirement, "<")) == 1, "no upper bound"


def test_threads_are_those_that_an_operator_gets():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert environment.device_facts("cpu")["threads"] == 1
    finally:
        torch.set_num_threads(before)
