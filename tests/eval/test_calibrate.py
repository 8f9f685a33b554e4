"""Times of a toy model, their fits, and the file between the two halves."""

from __future__ import annotations

import json

import pytest

from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Variant
from kvlab.eval import Calibrate
from kvlab.eval.calibrate import fit
from kvlab.eval.parts import uneven
from kvlab.model.load import RandomModel
from kvlab.sim import Calibration, CostModel
from kvlab.track import RunFolder

TOY = {"hidden_size": 32, "layers": 1, "query_heads": 2, "kv_heads": 1, "head_dim": 16,
       "mlp_size": 32, "vocabulary": 8192}  # fmt: skip
SMALL = {"lengths": [16, 64], "contexts": [16], "rows": [1, 2], "steps": 2, "copies": [64, 4096],
         "repeats": 1, "device": "cpu"}  # fmt: skip


def test_a_machine_is_measured_once_and_read_back(tmp_path):
    variants = [Variant("fp32", {}, CacheSpec(format="fp32", block_size=8))]
    job = Calibrate(RandomModel(**TOY), **SMALL, write=str(tmp_path / "here.json"))
    with RunFolder(tmp_path / "run") as folder:
        job.run(folder, variants)
        rows = folder.rows()
        job.run(folder, variants)
        assert folder.rows() == rows
    names = [row["name"] for row in rows]
    assert names.count("prefill_seconds") == 2 and names.count("decode_ms") == 2
    assert names.count("copy_gigabytes_per_second") == 4 and "fit_error_percent" in names
    cost = CostModel(calibration=str(tmp_path / "run"))
    assert cost.measures == Calibration.read(tmp_path / "here.json")
    assert cost.measures.token_bytes == 2 * 16 * 4 and cost.measures.about["device"] == "cpu"
    assert cost.prefill_ms(64) >= cost.prefill_ms(16) > 0
    assert cost.decode_ms(10, 100, 2) >= cost.decode_ms(10, 100, 1) > 0


@pytest.mark.parametrize("driver", ["auto", "eager"])
def test_parts_of_the_loop_are_timed_through_its_engine(tmp_path, driver):
    variants = [Variant("fp32", {}, CacheSpec(format="fp32", block_size=8))]
    job = Calibrate(RandomModel(**TOY), **SMALL | {"driver": driver}, prompts=[2], spread=[1.5],
                    chunk_tokens=64)  # fmt: skip
    with RunFolder(tmp_path / "run") as folder:
        job.run(folder, variants)
        rows = folder.rows()
    packed = [row["params"] for row in rows if "prompts" in row["params"]]
    assert bool(packed) == (driver == "auto")  # a chunk of the eager loop is of one prompt
    assert [row["params"]["longest"] for row in rows if "longest" in row["params"]] == [24, 24]
    made = Calibration.read(tmp_path / "run")
    assert len(made.prefill) == len(made.decode) == 4 and min(*made.prefill, *made.decode) >= 0


def test_rows_of_unlike_lengths_have_the_mean_that_is_asked_for():
    assert uneven(100, 4, 1) == [100] * 4 and uneven(100, 4, 3) == [300, 34, 33, 33]
    assert uneven(100, 2, 4) == [199, 1] and uneven(7, 1, 1) == [7]


def test_the_fit_finds_what_the_times_were_made_of():
    points = [(n, 3 + 0.01 * n + 1e-6 * n * n) for n in (100, 1000, 5000, 20_000)]
    found = fit([(1, n, n * n) for n, _ in points], [ms for _, ms in points])
    assert found == pytest.approx([3, 0.01, 1e-6], rel=1e-6)


def test_a_prompt_behind_a_prefix_costs_its_part():
    about = {"prefill": [1.0, 0.01, 1e-6], "decode": [5.0, 0.5, 1e-4], "to_host": [0.1, 1e-6],
             "to_device": [0.1, 1e-6], "token_bytes": 1000.0, "about": {}}  # fmt: skip
    made = Calibration(**about)
    cost = CostModel()
    object.__setattr__(cost, "calibration", "x")
    vars(cost)["measures"] = made
    whole, head = cost.prefill_ms(3000), cost.prefill_ms(1000)
    assert cost.prefill_ms(2000, behind=1000) == pytest.approx(whole - head + 1.0)
    assert cost.decode_ms(10, 95, 4) == pytest.approx(10 * (5 + 2 + 1e-4 * 4 * 100))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"prefill": [1, 2]}'])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(BadInput, match=r"service\.calibration"):
        CostModel(calibration=str(file))


def test_numbers_that_no_machine_has_are_refused(tmp_path):
    good = Calibration((1, 1, 0), (1, 1, 1), (0, 1), (0, 1), 4.0, {})
    good.write(tmp_path / "c.json")
    assert CostModel(calibration=str(tmp_path / "c.json")).prefill_ms(2) == 3
    bad = json.loads((tmp_path / "c.json").read_text()) | {"decode": [1, -1, 1]}
    (tmp_path / "c.json").write_text(json.dumps(bad))
    with pytest.raises(BadInput, match="no machine"):
        CostModel(calibration=str(tmp_path / "c.json"))
    for wrong in ({"lengths": [5]}, {"rows": []}, {"steps": 0}):
        with pytest.raises(BadInput):
            Calibrate(None, **{**SMALL, **wrong})
