"""Advice holds: bytes are those of live caches and of a GPU's run, and what is told can be run."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import hydra
import pytest
import torch
from tiny import make_tiny_model

import kvlab
from kvlab.advice import Ask, advise, advised, choices, losses, parse
from kvlab.advice.account import account
from kvlab.advice.choices import spec_of
from kvlab.advice.evict import evicting, least
from kvlab.advice.table import ASSETS, nearest_speed, speeds
from kvlab.advice.tell import command, python
from kvlab.config import built, conf_dir, make_plan
from kvlab.core import BadInput, CacheGeometry
from kvlab.model import outline
from kvlab.model.load import FolderModel, HubModel

SHAPES = {"SmolLM2-135M-Instruct": (30, 9, 3, 64), "Qwen2.5-Coder-0.5B-Instruct": (24, 14, 2, 64)}
LIVE = [*{row.options for row in losses() if row.options != ("format=bf16",)},
        ("format=bf16", "retrieval=quest"), ("format=int4", "format.residual=256"),
        ("format=int8", "policy=fifo", "offload=host", "cache.budget_blocks=5"),
        ("format=bf16", "window=sink", "window.middle=false", "window.sinks=4",
         "window.recent=200")]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_tiny_model().to(torch.bfloat16)


@pytest.fixture(scope="module")
def config(model):
    return model.config.to_dict()


@pytest.mark.parametrize("row", losses(), ids=lambda row: f"{row.model} {row.options}")
def test_bytes_are_to_the_byte_those_of_the_run_on_a_gpu(row):
    g = CacheGeometry(*SHAPES[row.model], 128)
    told = account(spec_of(row.options), g, 4096, 1, row.kernels)
    assert told.device == row.allocated_bytes


@pytest.mark.parametrize("options", sorted(LIVE), ids=" ".join)
def test_bytes_are_those_of_a_live_cache(model, options):
    ids = torch.randint(0, 128, (2, 700))
    cache = kvlab.PagedCache.for_model(model, spec_of(options))
    kvlab.prefill(model, ids, cache, chunk_tokens=128)
    g, stats = cache.geometry, cache.stats()
    told = account(spec_of(options), g, 700, 2, kernels=False)
    assert told.device == pytest.approx(stats.allocated_bytes, rel=0.1)
    assert told.host == pytest.approx(stats.host_bytes, rel=0.1)


def test_layers_with_a_window_of_their_own_let_blocks_go():
    model = make_tiny_model("Mistral", sliding_window=256).to(torch.bfloat16)
    cache = kvlab.PagedCache.for_model(model, block_size=128)
    kvlab.prefill(model, torch.randint(0, 128, (1, 1500)), cache, chunk_tokens=128)
    shapes = outline(model.config.to_dict()).portrait.shapes
    assert {shape.window for shape in shapes} == {256}
    told = account(spec_of(("format=bf16",)), cache.geometry, 1500, 1, kernels=False)
    assert told.device == pytest.approx(cache.stats().allocated_bytes, rel=0.1)


def test_words_of_each_kind_make_the_cache_that_was_counted(config):
    ask = Ask(0.1, 65536, 2, model=("model=reference",))
    made = outline(config)
    kinds = {choice.deed: choice for choice in choices(ask, made)}
    assert set(kinds) >= {None, "quest", "prefix", "window"}
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for choice in kinds.values():
            spec = built(shlex.split(command(choice, ask, made))[3:], "spec")
            assert spec.format.identity == choice.spec.format.identity
            assert spec.budget_blocks == choice.spec.budget_blocks


@pytest.mark.slow
@pytest.mark.parametrize("memory_gb", [0.02, 0.5])
def test_every_command_that_is_told_is_a_run(config, memory_gb):
    ask = Ask(memory_gb, 65536, 2, model=("model=reference",))
    made = outline(config)
    found = choices(ask, made)
    assert {choice.goal for choice in found} == {"exact", "facts", "chat", "stream"}
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for choice in found:
            words = shlex.split(command(choice, ask, made))
            assert words[:3] == ["python", "-m", "kvlab"] and choice.forgets
            (variant,) = make_plan(words[3:]).variants[:1]
            assert variant.spec.format.identity == choice.spec.format.identity


def test_the_line_of_python_makes_the_cache_that_was_counted(config, model):
    for choice in choices(Ask(0.03, 65536, 2), outline(config)):
        cache = eval(python(choice), {"kvlab": kvlab, "model": model})
        assert repr(cache.spec.format) == repr(choice.spec.format)
        assert vars(cache.spec.window) == vars(choice.spec.window)
        assert cache.spec.budget_blocks == choice.spec.budget_blocks


def test_less_memory_fits_less_and_host_memory_takes_the_rest(config):
    made = outline(config)
    wide, narrow = (choices(Ask(gb, 1 << 20, goal="exact"), made) for gb in (8, 0.3))
    assert [(c.name, c.fits) for c in wide] == [("bf16", True)]
    assert [(c.deed, c.fits) for c in narrow] == [(None, False), ("host", True)]
    assert narrow[1].needed <= 0.3e9 < narrow[0].needed and narrow[1].end.host > 0


def test_a_window_does_not_grow(config):
    made = outline(config)
    short, long = (choices(Ask(1, n, goal="stream"), made) for n in (1 << 15, 1 << 20))
    assert [c.end for c in short] == [c.end for c in long]


def test_the_answer_names_losses_sources_and_neighbours(config):
    told = advise(Ask(1, 65536, 2, "facts", device="NVIDIA H200"), config)
    for word in ("78deed3", "NVIDIA H200", "SmolLM2-135M-Instruct", "--kv-cache-dtype",
                 "cache_implementation", "forgets", "PagedCache.for_model", "Left out"):
        assert word in told
    [commit] = {s.commit[:7] for s in speeds() if s.report == "decode_speed"}
    assert f"commit {commit}, reports/decode_speed" in told  # of a machine without other work
    assert "not measured on" in advise(Ask(1, 65536, device="A100"), config)


def test_nothing_fits_is_said_with_what_is_needed(config):
    assert "Nothing of these fits: the smallest needs" in advise(Ask(1e-4, 65536), config)
    assert "ask for another goal" in advise(Ask(1, 4000, goal="stream"), config)


def test_what_loses_least_comes_first_and_what_loses_much_is_not_advised(config):
    found = choices(Ask(8, 65536, goal="facts"), outline(config))
    assert found[0].name == "int8"
    assert "int2" in [c.name for c in found if c.loses]
    assert "int2" not in [c.name for c in advised(found)]


WINDOW = ("window=sink", "window.middle=false", "window.sinks=4", "window.recent=4092")
PARTS = [("stream", "window=sink", WINDOW), ("facts", "quest", ("retrieval=quest",))]


def _told(config, goal, words):
    """The line of the table and what is said of the loss, of the composition in 16 bits."""
    told = advise(Ask(8, 65536, goal=goal), config, 300).splitlines()
    (line, *_) = [line for line in told if line.startswith(goal) and f"bf16 {words}" in line or
                  line.startswith(goal) and "bf16" in line and words in line]  # fmt: skip
    at = [i for i, line in enumerate(told) if line.startswith("bf16 ") and words in line][0]
    return line, told[at + 2]


@pytest.mark.parametrize(("goal", "words", "_options"), PARTS)
def test_a_loss_that_nobody_measured_is_no_zero(
    config, tmp_path, monkeypatch, goal, words, _options
):
    (tmp_path / "none.jsonl").touch()
    monkeypatch.setattr("kvlab.advice.table.PARTIAL", tmp_path / "none.jsonl")
    line, loss = _told(config, goal, words)
    assert line.count("not measured") == 2
    assert "loss          not measured: what" in loss


@pytest.mark.parametrize(("goal", "words", "options"), PARTS)
def test_what_a_part_of_the_past_lost_is_told_once_it_is_measured(
    config, tmp_path, monkeypatch, goal, words, options
):
    """Of 16 bits; with fewer, that both together were not."""
    rows = [json.loads(line) for line in (ASSETS / "losses.jsonl").read_text().splitlines()]
    rows = [row | {"options": ["format=bf16", *options], "perplexity": [1.5, 1.0, 2.5],
                   "kl": [0.0001, 0.00005, 0.0002], "top1": None, "setting": "8 books"}
            for row in rows if row["options"] == ["format=bf16"]]  # fmt: skip
    (tmp_path / "partial.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("kvlab.advice.table.PARTIAL", tmp_path / "partial.jsonl")
    line, loss = _told(config, goal, words)
    assert line.count("1.50 [1.00, 2.50]") == 2
    assert "perplexity +1.50 [+1.00, +2.50] %, KL 0.0001" in loss and "8 books" in loss
    assert ("of decoded tokens" in loss) == (goal == "facts")
    found = choices(Ask(8, 65536, goal="stream"), outline(config))
    assert [c.known for c in found][1:] == [False] * (len(found) - 1)


@pytest.mark.parametrize("width", [80, 110, 140, 200])
def test_the_table_fits_the_terminal(config, width):
    table = advise(Ask(8, 65536), config, width).split("\n\n")[1].splitlines()
    assert max(map(len, table)) <= width and table[0].startswith("goal")


def test_weights_need_not_be_there(config, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--o--n" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    (tmp_path / "models--o--n" / "refs").mkdir()
    (tmp_path / "models--o--n" / "refs" / "main").write_text("1")
    assert FolderModel(str(snapshot)).config() == json.loads(json.dumps(config))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert outline(HubModel("o/n").config()).parameters == outline(config).parameters
    with pytest.raises(BadInput, match="holds no model.safetensors"):
        FolderModel(str(snapshot)).load("cpu")


@pytest.mark.parametrize(("words", "match"), [
    (["context=10"], "device.memory_gb=null: must be given"),
    (["device.memory_gb=1"], "context=null: must be given"),
    (["device.memory_gb=-1", "context=10"], "device.memory_gb=-1: must be a number of GB above 0"),
    (["device.memory_gb=nan", "context=10"], "must be a number of GB above 0"),
    (["device.memory_gb=1", "context=1.5"], "context=1.5: must be a whole number"),
    (["device.memory_gb=1", "context=8", "requests=0"], "requests=0: must be a whole number"),
    (["device.memory_gb=1", "context=8", "goal=fast"], "goal=fast: must be one of: exact"),
    (["device.memory_gb=1", "context=8", "format=int4"], "advise=format=int4: takes model="),
    (["hurry"], "advise=hurry: takes model="),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused(words, match):
    with pytest.raises(BadInput, match=match):
        parse(words)


def test_the_command_answers(capsys):
    from kvlab.__main__ import main

    assert main(["advise", "model=reference", "device.memory_gb=2", "context=8192"]) == 0
    assert "6 layers" in capsys.readouterr().out
    assert main(["advise", "model=reference", "device.memory_gb=2"]) == 2
    assert "must be given" in capsys.readouterr().err
    assert main(["advise", "model=nothing", "device.memory_gb=2", "context=8192"]) == 2


def test_the_tables_that_ship_are_those_of_the_committed_reports():
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("advice_table",
                                                  root / "experiments" / "advice" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    reports = root / "reports"
    for name, rows in (("losses", table.losses(reports, table.FORMATS)),
                       ("evictions", table.losses(reports, table.EVICTION)
                        + table.summaries(reports)),
                       ("partial", table.partial(reports)),
                       ("speeds", table.speeds(reports))):  # fmt: skip
        shipped = (ASSETS / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in shipped] == rows


@pytest.mark.parametrize(("options", "tokens", "requests", "found"), [
    (("format=int4",), 32768, 1, (("format=int4",), 32768, 1)),
    (("format=int4",), 40000, 12, (("format=int4",), 32768, 16)),
    (("format=int8", "prefix=hash", "policy=lru"), 150_000, 1, (("format=int8",), 200_000, 1)),
    (("format=int3g",), 32768, 1, None),
])  # fmt: skip
def test_a_speed_is_that_of_the_nearest_row_that_does_the_same(options, tokens, requests, found):
    row = nearest_speed(options, "decode", tokens, requests, "NVIDIA H200")
    assert (row and (row.options, row.tokens, row.batch)) == found
    assert nearest_speed(options, "decode", tokens, requests, "A100") is None


def test_what_was_measured_with_more_beside_stands_for_it():
    row = nearest_speed(("format=bf16", "retrieval=quest"), "decode", 131_072, 1, "NVIDIA H200")
    assert row.tokens == 200_000 and "retrieval=quest" in row.options


def test_eviction_is_told_with_its_interval_and_what_is_measured_of_it(config):
    made = outline(config)
    found = evicting(Ask(1, 65536), made)
    assert found and all(row.perplexity.low <= row.perplexity.value <= row.perplexity.high
                         for one in found for row in one.losses)  # fmt: skip
    assert [one.worst for one in found] == sorted(one.worst for one in found)
    told = advise(Ask(1, 65536, goal="stream", model=("model=reference",)), config, 200)
    for one in least(found):
        assert one.name in told and all(o in told for o in one.options if "policy" in o)
    assert "no policy evicts tokens" in told and "kvpress" in told
    assert "kvpress" not in advise(Ask(1, 65536, goal="exact"), config, 200)


def test_bytes_of_eviction_are_those_of_a_live_cache(model, config):
    for one in least(evicting(Ask(1, 2048), outline(config), kernels=False)):
        cache = kvlab.PagedCache.for_model(model, spec_of(one.options, one.block_size))
        kvlab.prefill(model, torch.randint(0, 128, (1, 2048)), cache, chunk_tokens=256)
        exact = "summary" not in one.name and ("snapkv" in one.name or "expected" in one.name)
        rel = 0 if exact else 0.1  # entries and means of scores are not in the account
        assert one.bytes == pytest.approx(cache.stats().allocated_bytes, rel=rel)


@pytest.mark.parametrize(("options", "tokens", "sequences"), [
    (("format=bf16", "policy=snapkv", "cache.budget_percent=25"), 1664, 1),
    (("format=bf16", "retrieval=quest"), 896, 9),  # sequences share slabs of digests
])  # fmt: skip
def test_bytes_are_to_the_byte_those_of_a_live_cache(model, options, tokens, sequences):
    cache = kvlab.PagedCache.for_model(model, spec_of(options))
    kvlab.prefill(model, torch.randint(0, 128, (sequences, tokens)), cache, chunk_tokens=128)
    told = account(spec_of(options), cache.geometry, tokens, sequences, kernels=False)
    assert told.device == cache.stats().allocated_bytes
