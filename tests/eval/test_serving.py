"""The jobs on live requests, at the smallest size that still shows something."""

from __future__ import annotations

import pytest

from kvlab.cache import CacheSpec
from kvlab.core import BadInput
from kvlab.eval import Load, Parity, PrefixHitRate
from kvlab.eval.data import Books
from kvlab.model.load import RandomModel
from kvlab.serve import TraceRequests
from kvlab.serve.ttft import TtftModel
from kvlab.sim import workloads
from kvlab.track import RunFolder


class Tiny(RandomModel):
    def __init__(self):
        super().__init__(hidden_size=32, layers=2, query_heads=2, kv_heads=1, head_dim=16,
                         mlp_size=32, vocabulary=8192)  # fmt: skip


@pytest.fixture
def requests():
    trace = workloads.chats(30, open_chats=4, system_tokens=16, user_tokens=8, output_tokens=6,
                            block_size=4)  # fmt: skip
    return TraceRequests(trace, 30, block_tokens=4, output_tokens=2)


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "run") as made:
        yield made


def values(folder, name):
    return [row["value"] for row in folder.rows() if row["name"] == name]


def test_parity_finds_no_difference(folder, requests, capsys):
    spec = CacheSpec(format="fp32", block_size=4, policy="lru", budget_blocks=40)
    job = Parity(Tiny(), requests, Books(), spec, ["lru", "fifo"], ["tova", "lru"],
                 text_tokens=400, text_blocks=20, chunk_tokens=32, batch=3,
                 batch_output_tokens=3, device="cpu")  # fmt: skip
    job.run(folder)
    assert {r["params"]["scene"] for r in folder.rows()} == {"requests", "batch", "text"}
    assert set(values(folder, "replay_differing_decisions")) == {0}
    assert set(values(folder, "simulated_differing_decisions")) == {0}
    assert set(values(folder, "hit_difference")) == {0}
    assert all(n > 20 for n in values(folder, "evictions"))
    assert values(folder, "policies_that_differ") == [1] * 6
    assert "live" not in capsys.readouterr().out
    job.run(folder)  # resumed: nothing is measured twice
    assert len(values(folder, "evictions")) == 6


def test_hit_rates_are_those_of_the_simulation(folder, requests):
    job = PrefixHitRate(Tiny(), [requests], CacheSpec(block_size=4), ["lru", "belady"], [0.01],
                        ["bf16", "int8"], calibrate=1, device="cpu")  # fmt: skip
    job.run(folder)
    assert len(values(folder, "block_hit_percent")) == 4
    assert values(folder, "block_hit_percent") == values(folder, "simulated_block_hit_percent")
    assert set(values(folder, "requests_with_other_hits")) == {0}
    assert set(values(folder, "simulated_differing_decisions")) == {0}
    rows = {r["variant"]: r["value"] for r in folder.rows() if r["name"] == "block_hit_percent"}
    assert rows["int8 lru"] > rows["bf16 lru"] and rows["bf16 belady"] >= rows["bf16 lru"]
    assert all(v > 0 for v in values(folder, "predicted_ttft_ms"))


def test_load_loses_nothing(folder, requests):
    spec = CacheSpec(format="fp32", block_size=4, policy="lru", prefix="hash", budget_blocks=60)
    job = Load(Tiny(), requests, spec, [10, 1000], running=4, cancel=0.3, failures=0.05, sample=5,
               step_ms=5.0, device="cpu")  # fmt: skip
    job.run(folder)
    for name in ("leaked_blocks", "leaked_bytes", "leaked_device_bytes", "wrong_tokens",
                 "replay_differs", "refused_without_reason"):  # fmt: skip
        assert values(folder, name) == [0, 0], name
    slow, quick = values(folder, "ttft_p99_ms")
    assert quick > slow
    assert all(n > 0 for n in values(folder, "injected_failures"))
    done, left = values(folder, "done_requests"), values(folder, "cancelled_requests")
    assert all(d + c == 30 for d, c in zip(done, left)) and all(left)


def test_what_makes_no_sense_is_refused(folder, requests):
    plain = CacheSpec(block_size=4)
    with pytest.raises(BadInput, match="needs a budget"):
        Parity(Tiny(), requests, Books(), plain)
    with pytest.raises(BadInput, match="known here: adaptive"):
        Parity(Tiny(), requests, Books(), plain, policies=["tova"])
    with pytest.raises(BadInput, match="prefix=hash and a budget"):
        Load(Tiny(), requests, plain)
    with pytest.raises(BadInput, match="job.budgets_mib"):
        PrefixHitRate(Tiny(), requests, CacheSpec(budget_blocks=5, policy="lru"))
    with pytest.raises(BadInput, match="job.policies"):
        PrefixHitRate(Tiny(), requests, plain).run(folder, ["a variant"])


def test_time_to_the_first_token_is_fitted():
    truth = TtftModel(20.0, 0.5, 1e-4, 0.01, chunk_tokens=300)
    samples = [(n, found, float(truth.predict([n], [found])[0]))
               for n in (1, 50, 400, 900) for found in (0, n // 3, n // 2)]  # fmt: skip
    fitted = TtftModel.fit(samples, 300)
    assert fitted == pytest.approx(truth, rel=1e-6)
    assert fitted.predict([800], [700])[0] < fitted.predict([800], [0])[0]
    one, two = fitted.predict([300, 301], [0, 0])  # the second takes two steps, and reads the first
    assert two - one == pytest.approx(20 + 0.5 + 1e-4 * (301**2 - 300**2) / 2 + 0.01 * 300)
