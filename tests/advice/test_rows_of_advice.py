"""Which rows of a report the advice is made of, and what it says that they were set to."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from kvlab.advice.decision import part_rows
from kvlab.report import Book

ROOT = Path(__file__).resolve().parents[2]
WINDOW = {"window.recent": 4092, "block_size": 128}
QUEST = {"retrieval": "quest", "retrieval.budget_tokens": 2048, "block_size": 128}
FITTED = {"policy": "fifo", "summary": "fitted", "budget_percent": 10, "block_size": 16}


@pytest.fixture(scope="module")
def table():
    file = ROOT / "experiments" / "advice" / "table.py"
    spec = importlib.util.spec_from_file_location("table_of_advice", file)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def put(reports: Path, report: str, params: dict, words: str = "", variant="one") -> Path:
    """A report of one run of one variant on SmolLM2."""
    folder = reports / report
    folder.mkdir(parents=True, exist_ok=True)
    own = {"run": "smollm2-135m", "chunk_tokens": 512, "decode_tokens": 96, "weights": "gguf Q4_1",
           "tokens": 8192} | params  # fmt: skip
    made = {"perplexity": 20.0, "perplexity_delta_percent": 1.5, "kl_mean_nats": 0.01,
            "perplexity_decoded_delta_percent": 2.5, "kl_decoded_mean_nats": 0.02,
            "bits_per_element": 16.0, "cache_allocated_bytes": 1e6}  # fmt: skip
    lines = [json.dumps({"variant": variant, "params": own, "name": name, "value": value,
                         "unit": "", "better": None, "low": None, "high": None,
                         "count": 3 * (own["tokens"] - 1)}) for name, value in made.items()]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    told = {"command": f"python -m kvlab experiment={report} {words}", "commit": "c",
            "dirty": False, "host": {"load_average": 0.1, "cores": 2},
            "device": {"kind": "cpu", "name": "AMD EPYC"}}  # fmt: skip
    (folder / "environments.json").write_text(json.dumps({"smollm2-135m": told}))
    return reports


@pytest.mark.parametrize(("report", "params", "rows"), [
    ("real_windows", WINDOW, 1),
    ("real_windows", WINDOW | {"tokens": 8183}, 0),  # kept more than half of what it was judged by
    ("real_windows", WINDOW | {"window.rerotate": True}, 0),
    ("real_retrieval", QUEST | {"tokens": 4096}, 1),
    ("real_retrieval", QUEST | {"tokens": 4095}, 0),
    ("real_retrieval", QUEST | {"retrieval": "random"}, 0),  # a variant here, and yet a control
    ("real_retrieval", QUEST | {"retrieval": "mean_key"}, 0),
])  # fmt: skip
def test_a_part_of_the_past_is_told_where_it_was_one(tmp_path, table, report, params, rows):
    assert len(table.partial(put(tmp_path, report, params))) == rows


@pytest.mark.parametrize(("tokens", "told"), [(8192, True), (8183, False)])
def test_the_decision_table_takes_no_loss_of_a_text_that_was_kept(tmp_path, tokens, told):
    variant = "window.recent=4092 cache.block_size=128"
    put(tmp_path, "real_windows", WINDOW | {"tokens": tokens}, variant=variant)
    assert (part_rows(Book(tmp_path), "window") is not None) == told


@pytest.mark.parametrize(("words", "recent"), [
    ("", 128), ("window.recent=32 eval.tokens=3072", 32),
    ("'variants=[\"policy=fifo window.recent=8 \"]'", 128)])  # fmt: skip
def test_what_the_command_of_a_run_set_is_told(tmp_path, table, words, recent):
    [row] = table.summaries(put(tmp_path, "real_summaries", FITTED, words))
    assert f"window.recent={recent}" in row["options"] and "window.sinks=4" in row["options"]
    assert row["device"] == "AMD EPYC" and not row["kernels"]


def test_a_report_says_what_it_was_measured_on(tmp_path):
    book = Book(put(tmp_path, "real_windows", WINDOW))
    assert book.devices("real_windows") == "CPU" and book.devices("no_report") == ""
    file = tmp_path / "real_windows" / "environments.json"
    other = {"device": {"kind": "cuda", "name": "NVIDIA H200"}}
    file.write_text(json.dumps({"a": other, "b": other} | json.loads(file.read_text())))
    assert book.devices("real_windows") == "H200 and CPU"
