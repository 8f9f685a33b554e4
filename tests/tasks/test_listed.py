"""A task is one class and one yaml of its name; lists of tasks take the settings of the run."""

from __future__ import annotations

import re
from importlib import import_module
from inspect import getsource
from pathlib import Path

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from kvlab.__main__ import main
from kvlab.config import complaint, conf_dir, make_plan
from kvlab.config.overrides import with_list_of_tasks
from kvlab.core import BadInput
from kvlab.eval import TASKS, asking
from kvlab.eval.tasks import Drawn

YAMLS = {file.stem: OmegaConf.load(file) for file in (conf_dir() / "task").glob("*.yaml")}


def planned(*strings):
    with hydra.initialize_config_dir(str(conf_dir()), job_name="kvlab", version_base="1.3"):
        return make_plan(with_list_of_tasks(["job=bench", "experiment=none", *strings]))


def test_every_name_has_a_yaml_of_the_same_class():
    assert set(TASKS) == set(YAMLS) - {"none"}
    for name, path in TASKS.items():
        module, _, cls = path.rpartition(".")
        named, _, short = YAMLS[name]._target_.rpartition(".")
        found = getattr(import_module(named), short)
        assert found is getattr(import_module(module), cls) and short == cls


def test_one_task_or_a_list_of_them_has_the_settings_of_the_run(tmp_path):
    for given, names in (("task=vt", ["vt"]), ("task=[vt,niah_single_2]",
                                               ["vt", "niah_single_2-books"])):
        plan = planned(given, "eval.lengths=[512]", "eval.query_aware=true", "eval.samples=3",
                       f"hydra.run.dir={tmp_path / 'run'}")
        assert [task.name for task in plan.job.tasks] == names
        for task in plan.job.tasks:
            assert task.params()["query_aware"] and task.params()["tokens"] == 512
            assert task.protocol.samples == 3


def test_wrong_settings_of_a_listed_task_name_the_key_to_change(tmp_path):
    for line, told in (("eval.samples=0", "eval.samples=0: must be at least 1"),
                       ("eval.chat=loud", "eval.chat=loud"),
                       ("eval.squad=/no/file", "eval.squad=/no/file: is not SQuAD")):
        with pytest.raises((BadInput, HydraException)) as caught:
            planned("task=[vt,qa_1]", line, f"hydra.run.dir={tmp_path / 'run'}")
        assert told in str(complaint(caught.value)), line


def test_a_group_is_listed_by_its_own_name(capsys):
    assert main(["task=list"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("task=\n") and "niah_single_1" in told and "policy=" not in told


def test_the_document_names_what_a_part_has():
    text = (Path(__file__).parents[2] / "docs/TASKS.md").read_text()
    named = set(re.findall(r"`part\.(\w+)", text))
    assert named >= {"items", "judged"}
    code = getsource(asking)
    assert all(hasattr(Drawn, name) or f"self.{name}" in code for name in named)
    for name in re.findall(r"`kvlab\.eval\.asking\.(\w+)", text):
        assert hasattr(asking, name)
