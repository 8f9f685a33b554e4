"""The study of field tasks: which tasks and jobs follow from what the full cache can do, and what
its tables say."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

from kvlab.eval.controls import controls
from kvlab.model import PagedCache, forward_chunk, prefill
from kvlab.model.centres import query_centres
from kvlab.model.gates import retrieval_gates
from tests.tiny import make_tiny_model

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "field_tasks"


class Letters:
    """A tokenizer of bytes, without a chat template."""

    chat_template = None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(c) % 128 for c in text]}


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"field_tasks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


plan, table = loaded("plan"), loaded("table")
MODELS = {"large": [4096, 8192], "small": [4096]}


def test_tasks_are_those_that_the_full_cache_can_do_and_that_are_not_guessed():
    told = {"niah_single_1": (100.0, 0.0), "vt": (70.0, 50.0), "cwe": (30.0, 0.0),
            "niah_single_2": (60.0, 0.0), "math_find": (95.0, 10.0)}  # fmt: skip
    assert plan.possible(told) == ["niah_single_2", "niah_single_1", "math_find"]
    assert plan.possible(told, 1) == ["niah_single_2"]


def test_a_task_whose_guess_was_not_measured_is_not_chosen(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    both = loaded("run").both
    rows = [{"score": {"0": 1.0, "1": 0.0}}, {"score": {"0": 0.0}}]
    assert both(rows) == (50.0, 0.0)
    for part in ([], rows[:1], [rows[0], {}], [{"score": {}}, rows[1]]):
        assert both(part) is None


def test_jobs_have_names_of_their_own_and_arms_that_can_be_made():
    tasks = {(m, n): ["niah_single_2", "vt"] for m, lengths in MODELS.items() for n in lengths}
    jobs = plan.jobs(MODELS, tasks, 8)
    assert len({job.name for job in jobs}) == len(jobs)
    assert jobs[0].name == "outside-large-4096-niah_single_2-25"
    kinds = {}
    for job in jobs:
        kinds.setdefault((job.kind, job.methods, job.budget), job)
    gates = [[0.5]]
    for job in kinds.values():
        made = plan.variants(job, {"gates": gates} if job.kind == "evict" else {})
        left_out = "triattention" in job.methods
        assert len(made) == len(job.methods) - left_out
        assert len({v.name for v in made}) == len(made)
        assert job.prompt_tokens and job.decoded_tokens


def test_a_part_of_the_study_has_those_arms_only():
    """What a machine without a GPU has time for; nothing is prepared that no method reads."""
    part = plan.Chosen(("snapkv", "kvzip"), ("int8",), plan.REQUESTS[:1], ("bf16",))
    assert all(job.kind != "prepare" for job in plan.probes(MODELS, 8, chosen=part))
    assert plan.probes(MODELS, 8)[0].kind == "prepare"
    made = plan.jobs({"small": [512]}, {("small", 512): ["vt"]}, 8, [25.0], part)
    assert [(job.name, job.methods) for job in made] == [
        ("outside-small-512-vt-25", ("snapkv", "kvzip")), ("formats-small-512-vt", ("int8",)),
        ("inside-small-512-vt-25", ("snapkv", "kvzip")),
        ("requests-small-512-scbench_kv_requests", ("bf16",)),
    ]  # fmt: skip


@torch.inference_mode()
def test_no_arm_of_the_study_is_another_one_under_its_name():
    """An adapter that silently runs another method, or another's budget, gives equal logits. And
    all of them hold as many tokens, but for the blocks that are not full."""
    model = make_tiny_model(num_hidden_layers=4)
    ids = torch.randint(0, 128, (1, 608), generator=torch.Generator().manual_seed(0))
    files = {"gates": retrieval_gates(model, draws=1),
             "centres": query_centres(model, ids.view(2, -1))}  # fmt: skip
    job = plan.Job("", "evict", "", methods=tuple(plan.METHODS), budget=25.0)
    arms = plan.variants(job, files)
    assert len(arms) == len(plan.METHODS)
    found, held = {}, {}
    for arm in [*arms, *controls(arms, 1 << 15)]:
        cache = PagedCache.for_model(model, arm.spec, tokenizer=Letters())
        prefill(model, ids, cache, chunk_tokens=1 << 15)
        held[arm.name] = cache.stats().resident_tokens
        found[arm.name] = forward_chunk(model, ids[:, :9], cache)[0]
    for (name, mine), (other, theirs) in combinations(found.items(), 2):
        both = name, other  # where lots are drawn, unlike budgets of few blocks may come out equal
        if not all("random" in word for word in both):
            assert not torch.equal(mine, theirs), both
    over = plan.BLOCK  # of a control: a window of whole blocks may be more than a layer's share
    assert {n: x for n, x in held.items()
            if not 152 - plan.BLOCK < x <= 152 + over * ("control" in n)} == {}  # fmt: skip


def test_what_is_not_run_as_published_is_not_called_so_in_a_table(tmp_path):
    job = plan.Job("", "evict", "", methods=("snapkv", "kvzip", "kvzip all_heads", "snapkv chunks"),
                   budget=25.0)  # fmt: skip
    names = [v.name for v in plan.variants(job, {})]
    assert names == ["snapkv 25%", "kvzip 25% (each head alike)", "kvzip all_heads 25%",
                     "snapkv chunks 25% (blocks of 16, each layer as ChunkKV)"]
    written(tmp_path, "evict", [arm("full", [1, 1]), *(arm(name, [1, 0]) for name in names)])
    page = "\n".join(table.sections(tmp_path))
    assert "| `snapkv` |" in page and "| `kvzip` |" not in page
    assert page.count("| `kvzip` (each head alike) |") == 3
    assert page.count("| `snapkv chunks` (blocks of 16, each layer as ChunkKV) |") == 3


def written(folder, job, rows):
    path = folder / "runs" / job / "items.jsonl"
    path.parent.mkdir(parents=True)
    base = {"model": "large", "tokens": 4096, "inside": False, "task": "vt", "control": False}
    path.write_text("".join(json.dumps(base | row) + "\n" for row in rows))


def arm(name, scores, budget=25.0, kind="evict", **more):
    told = {str(n): x for n, x in enumerate(scores)}
    return {"arm": name, "kind": kind, "budget": budget, "score": told, **more}


def test_tables_pair_by_item_with_the_control_of_the_same_budget(tmp_path):
    written(tmp_path, "full", [arm("full", [1, 1, 1, 0], 0.0, "probe"),
                               arm("no context", [0, 0, 0, 0], 0.0, "probe")])  # fmt: skip
    written(tmp_path, "evict", [
        arm("full", [1] * 12), arm("snapkv 25%", [1, 0] * 6, copied={"0": 0.5}, miscopied={"0": 1}),
        arm("snapkv adakv 25%", [1] * 12), arm("random 25% (control)", [0] * 12),
        arm("random adakv 25% (control)", [1] * 12), arm("window 25% (control)", [0] * 12),
    ])  # fmt: skip
    rows, arms = table.load(tmp_path)
    assert "| `vt` | 75 [" in table.possible(rows) and "; 0 |" in table.possible(rows)
    [(setting, _, budget)] = arms
    lines = {line.split(" | ")[0]: line
             for line in table.by_task(arms, setting, budget).splitlines()}
    assert "50 (**+50 [" in lines["| `snapkv`"] and "100 (+0 [" in lines["| `snapkv adakv`"]
    assert "| full | 100 |" in lines["| full"] + " |"
    assert "1 of 1 pairs" in table.by_head(arms) and "**+50 [" in table.by_head(arms)
    assert "| `snapkv` | 50 | 50 | 100 |" in table.copied(arms, setting, budget)
    page = "\n".join(table.sections(tmp_path))
    assert "question outside the compressed text" in page


@pytest.mark.parametrize("arm, name", [
    ("snapkv adakv 12.5% (each head)", "snapkv adakv"), ("random 25% (control)", "random"),
])
def test_an_arm_without_its_budget(arm, name):
    assert table.short(arm) == name
