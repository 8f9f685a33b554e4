"""Quality with its negative controls: rows, pairs, and what a resumed run keeps."""

from __future__ import annotations

import numpy as np
import pytest

from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Variant
from kvlab.eval import Bench, Evaluate, Study, TextLoss
from kvlab.eval.data import Books
from kvlab.eval.runner import Runner
from kvlab.eval.task import Item
from kvlab.eval.text_loss import by_position, decoded
from kvlab.model.load import ReferenceModel
from kvlab.track import RunFolder


def job(**changes):
    about = {"documents": 1, "tokens": 200, "decode_tokens": 2, "chunk_tokens": 64,
             "progress": False, "device": "cpu"}  # fmt: skip
    return Evaluate(ReferenceModel(), Books(), **about | changes)


MASS = Variant("attention_mass 40%", {"policy": "attention_mass"}, CacheSpec(
    policy="attention_mass", budget_percent=40, block_size=16, evict="block"))  # fmt: skip
INT4 = Variant("int4", {"format": "int4"}, CacheSpec(format="int4", block_size=16))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with RunFolder(tmp_path_factory.mktemp("quality") / "run") as folder:
        job().run(folder, [MASS])
        return folder.rows()


def test_controls_stand_beside_their_variant_and_are_not_timed(rows):
    by_variant = {}
    for row in rows:
        by_variant.setdefault(row["variant"], {})[row["name"]] = row
    assert list(by_variant) == [
        "full", "noise floor", "attention_mass 40%", "random 40% (control)",
        "shuffled attention_mass 40% (control)", "window 40% (control)",
    ]  # fmt: skip
    timed = [v for v, found in by_variant.items() if "prefill_seconds" in found]
    assert timed == ["full", "attention_mass 40%"]
    params = [found["perplexity"]["params"] for found in by_variant.values()]
    assert len([p for p in params if p.get("control")]) == 4


def test_every_row_names_the_model_and_its_weights(rows):
    told = {(row["params"]["model"], row["params"]["weights"]) for row in rows}
    assert told == {("reference", "safetensors (68 BF16)")}


def test_differences_to_controls_are_paired(rows):
    value = {(r["variant"], r["name"]): r["value"] for r in rows}
    mine = value["attention_mass 40%", "kl_mean_nats"]
    for kind, control in (("random", "random 40% (control)"), ("window", "window 40% (control)")):
        told = value["attention_mass 40%", f"kl_minus_{kind}_nats"]
        assert told == pytest.approx(mine - value[control, "kl_mean_nats"], abs=1e-9)


def test_controls_can_be_left_out_and_a_study_runs_its_parts(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        Study(job(controls=False, noise_floor=False), None).run(folder, [MASS])
        assert {r["variant"] for r in folder.rows()} == {"full", "attention_mass 40%"}


def test_decoded_tokens_are_the_last_scores_of_each_document():
    full, mine = (Runner(name, {"decode_tokens": 3}, CacheSpec()) for name in ("full", "mine"))
    for length in (5, 7):  # the last of the three has no successor, so two are scored
        full.raws[length] = {"nll": np.zeros(length)}
        mine.raws[length] = {"nll": np.r_[np.full(length - 2, 9.0), 0.1, 0.3],
                             "kl": np.r_[np.full(length - 2, 9.0), 1.0, 3.0],
                             "same": np.r_[np.zeros(length - 2), 1, length == 5]}  # fmt: skip
    found = {row.name: row for row in decoded(mine, full, 0)}
    assert found["kl_decoded_mean_nats"].value == pytest.approx(2.0)
    assert found["kl_decoded_mean_nats"].count == 4
    assert found["top1_decoded_agreement_percent"].value == pytest.approx(75)
    assert found["perplexity_decoded_delta_percent"].value == pytest.approx(100 * np.expm1(0.2))
    assert not list(decoded(Runner("mine", {"decode_tokens": 1}, CacheSpec()), full, 0))


def test_kl_and_top1_are_told_by_position_too():
    full, mine = (Runner(name, {}, CacheSpec()) for name in ("full", "mine"))
    late = np.arange(640) >= 320
    for number in (0, 1):
        full.raws[number] = {"nll": np.ones(640)}
        mine.raws[number] = {"nll": 1 + 0.1 * late, "kl": 0.2 * late, "same": ~late}
    found = by_position(mine, full)
    assert len(found["position"]) == 16
    for name, last in (("nll_delta", 0.1), ("kl", 0.2), ("top1", 0.0)):
        first = 100.0 if name == "top1" else 0.0
        np.testing.assert_allclose(found[name], [first] * 8 + [last] * 8, atol=1e-12)
    assert found["top1_high"].max() <= 100 and found["kl_low"].min() >= 0


@pytest.mark.parametrize("driver, device", [
    ("static", "cpu"), pytest.param("graph", "cuda", marks=pytest.mark.gpu),
])  # fmt: skip
def test_decoded_tokens_may_go_through_the_step_that_is_captured(tmp_path, driver, device):
    """Static is that step, run as it is; the numbers are those of the library's forward."""
    rows = {}
    for name in ("eager", driver):
        with RunFolder(tmp_path / name) as folder:
            task = TextLoss(1, 80, 9, name, noise_floor=False)
            Bench(ReferenceModel(dtype="float32"), task, Books(), 32, controls=False,
                  progress=False, device=device).run(folder, [INT4])  # fmt: skip
            rows[name] = {(r["variant"], r["name"]): r["value"] for r in folder.rows()}
    assert rows[driver] == pytest.approx(rows["eager"], rel=1e-3, abs=1e-4)
    assert rows[driver]["int4", "kl_decoded_mean_nats"] > 1e-4


def test_null_decodes_what_the_device_can_afford():
    loaded = ReferenceModel().load("cpu")
    assert [TextLoss(tokens=n).parts(loaded)[0].decode_tokens for n in (4096, 40)] == [32, 20]
    assert TextLoss(tokens=40, decode_tokens=7).parts(loaded)[0].decode_tokens == 7


def test_documents_of_one_chunk_are_refused():
    """What one chunk reads it has computed itself: eviction behind it would seem to cost nothing,
    as in the first `experiment=head_budgets` (4,096 tokens in chunks of 4,096)."""
    task, item = TextLoss(1, 80, 0), Item("a", np.arange(80))
    with pytest.raises(BadInput, match="in one chunk"):
        task.check([item], 80)
    task.check([item], 79)
    TextLoss(1, 80, 8).check([item], 80)
