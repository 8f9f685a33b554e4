"""The bridge to lm-evaluation-harness against the harness's own Hugging Face class."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Variant
from kvlab.eval import LmEval
from kvlab.eval.data import Books
from kvlab.model.load import ReferenceModel
from kvlab.track import RunFolder

SPEC = CacheSpec(format="fp32", block_size=16)
CHOICE = """
task: kvlab_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: kvlab_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
WRITTEN = """
task: kvlab_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
NAMES = ("kvlab_choice", "kvlab_rolling", "kvlab_written")


def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks made here: pieces of the bundled books, and how they go on among other pieces."""
    lm_eval()
    path = tmp_path_factory.mktemp("tasks")
    words = next(Books().texts())[1].split()[2000:]
    rows = []
    for n in range(6):
        size = 30 + 11 * n  # rows of a batch differ in length
        piece = [" ".join(words[at : at + 4]) for at in (size, size + 400, size + 800)]
        rows.append({"text": " ".join(words[:size]), "choices": [f" {p}" for p in piece]})
        words = words[1000:]
    file = path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for name, text in zip(NAMES, (CHOICE, ROLLING, WRITTEN)):
        (path / f"{name}.yaml").write_text(text.format(file=file))
    return path


def evaluated(model, folder):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=str(folder), include_defaults=False)  # its own take a minute
    return simple_evaluate(model, tasks=list(NAMES), bootstrap_iters=0, log_samples=True,
                           task_manager=known)


@pytest.fixture
def quick(monkeypatch):
    """The job, knowing the tasks made here only."""
    import lm_eval.tasks

    sound = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager",
                        lambda include_path: sound(include_path=include_path,
                                                   include_defaults=False))


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    loaded = ReferenceModel().load("cpu")
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=3)
    return evaluated(model, folder)


@pytest.mark.parametrize("batch_size, chunk_tokens", [(1, 512), (4, 24)])
def test_the_full_cache_scores_as_the_harness(folder, theirs, batch_size, chunk_tokens):
    from kvlab.eval.harness import KvlabLM

    ours = evaluated(KvlabLM(ReferenceModel().load("cpu"), SPEC, chunk_tokens, batch_size), folder)
    for task in NAMES:
        for name, value in theirs["results"][task].items():
            mine = ours["results"][task][name]
            if isinstance(value, float) and "perplexity" in name:
                assert mine == pytest.approx(value, rel=1e-5)
            else:
                assert mine == value, (task, name)
        for a, b in zip(ours["samples"][task], theirs["samples"][task]):
            if task == "kvlab_written":
                assert a["resps"] == b["resps"] and len(a["resps"][0][0])
                continue
            got, right = (np.array([r[0] if isinstance(r[0], tuple) else r for r in x["resps"]],
                                   dtype=float) for x in (a, b))
            assert np.allclose(got, right, rtol=1e-4, atol=1e-3)


def test_a_compressed_cache_gives_other_scores_and_serves_a_row_at_a_time(folder, theirs):
    from kvlab.eval.harness import KvlabLM

    spec = CacheSpec(format="int2", block_size=16, policy="fifo", budget_percent=30)
    model = KvlabLM(ReferenceModel().load("cpu"), spec, 16, batch_size=4)
    assert model.batch_size == 1
    [told] = model._loglikelihood_tokens([(None, list(range(5, 200)), [7, 8])])
    [full] = KvlabLM(ReferenceModel().load("cpu"), SPEC)._loglikelihood_tokens(
        [(None, list(range(5, 200)), [7, 8])])
    assert abs(told[0] - full[0]) > 1e-3
    with pytest.raises(BadInput, match="past the cache"):
        model._model_call(torch.zeros(1, 2, dtype=torch.long))


def test_the_job_writes_scores_and_paired_differences(folder, tmp_path, quick):
    variant = Variant("int4", {"format": "int4"}, CacheSpec(format="int4", block_size=16))
    job = LmEval(ReferenceModel(), ["kvlab_choice"], str(folder), limit=3, device="cpu",
                 baseline="fp32")
    for _ in range(2):  # a second start measures nothing
        with RunFolder(tmp_path / "run", resume=(tmp_path / "run").exists()) as run:
            job.run(run, [variant])
            rows = {(r["variant"], r["name"]): r for r in run.rows()}
            assert len(rows) == len(run.rows())
    assert rows["int4", "acc"]["params"]["task"] == "kvlab_choice"
    assert rows["int4", "lm_eval_samples"]["value"] == 3
    assert rows["int4", "acc_minus_full"]["count"] == 3 and ("full", "acc_minus_full") not in rows
    with pytest.raises(BadInput, match="is no task of lm-evaluation-harness"):
        LmEval(ReferenceModel(), ["nothing"], device="cpu")._evaluated(None, "nothing")


def test_without_the_harness_or_tasks_the_job_says_so(monkeypatch, tmp_path):
    with pytest.raises(BadInput, match=r"job.tasks=\[\]: name tasks"):
        LmEval(ReferenceModel())
    for name in ("lm_eval", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "kvlab.eval.harness", raising=False)
    with RunFolder(tmp_path / "run") as run, pytest.raises(BadInput, match="kvlab.lm-eval"):
        LmEval(ReferenceModel(), ["x"], device="cpu").run(run, [])
