"""What a trace is, printed and as rows; the golden rates of what is bundled."""

import numpy as np
import pytest

from kvlab.config import make_plan
from kvlab.core import BadInput
from kvlab.sim import Definitions, load_trace
from kvlab.sim.describe import TraceFacts, bars, ideal
from kvlab.sim.jobs import HitRate
from kvlab.track import RunFolder

# An unbounded cache, counted by an independent loop over the released files:
# (blocks that hit, block accesses, percent of blocks, percent of tokens) by definition.
GOLDEN = {
    "conversation": {
        "hit": (105_710, 288_500, 36.6412, 37.3624),
    },
    "synthetic": {
        "hit": (77_953, 121_877, 63.9604, 65.1244),
    },
}


def by_hand(trace, partial):
    """A loop of its own: the leading run of each request that was seen before."""
    seen, hits, blocks, tokens = set(), 0, 0, 0
    for ids, length in zip(trace.requests(), trace.input_tokens.tolist()):
        cut = length % trace.block_size > 0
        row = ids[:-1] if partial == "drop" and cut else ids
        run = next((i for i, name in enumerate(row) if name not in seen), len(row))
        run -= partial == "miss" and cut and run == len(row)
        seen.update(row)
        hits, blocks = hits + run, blocks + len(row)
        tokens += min(run * trace.block_size, length)
    return hits, blocks, tokens


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_rates_of_the_bundled_traces(name):
    trace = load_trace(name)
    for partial in ("hit", "miss", "drop"):
        definitions = Definitions(partial)
        found = ideal(definitions.apply(trace), definitions.replayed)
        hand = by_hand(trace, partial)
        assert (found.block_hits, found.block_accesses, found.token_hits) == hand
        if partial in GOLDEN[name]:
            hits, accesses, blocks, tokens = GOLDEN[name][partial]
            assert (found.block_hits, found.block_accesses) == (hits, accesses)
            assert found.block_hit_percent == pytest.approx(blocks, abs=5e-5)
            assert found.token_hit_percent == pytest.approx(tokens, abs=5e-5)


def run(job, path):
    with RunFolder(path) as folder:
        job.run(folder, [])
        return folder.rows()


def test_rows_name_every_definition_and_the_print_says_what_was_assumed(tmp_path, tiny, capsys):
    trace = tiny([0, 1], [0, 2], [3], [0, 1])
    job = TraceFacts(trace, write=str(tmp_path / "out.jsonl"), window_seconds=2.0)
    rows = run(job, tmp_path / "r")
    value = {row["name"]: row["value"] for row in rows}
    assert value["requests"] == 4 and value["distinct_blocks"] == 4
    assert value["ideal_block_hit_percent"] == pytest.approx(100 * 3 / 7)
    assert value["reuse_distance_p50_blocks"] == 2 and value["working_set_peak_blocks"] == 3
    params = rows[0]["params"]
    assert {"partial_blocks", "measured", "outputs", "first_requests", "format"} <= params.keys()
    told = capsys.readouterr().out
    assert "over time, 2 s: ██" in told
    assert bars(np.array([0, 4, 8])) == "▁▅█" and len(bars(np.arange(999))) == 60
    assert "tiny: made, blocks of 4 tokens" in told and "partial_blocks=hit" in told
    assert list(load_trace(tmp_path / "out.jsonl", 4).requests()) == list(trace.requests())
    held = np.load(tmp_path / "r" / "trace_tiny.npz")
    assert held["working_set_blocks"].tolist() == [3, 3]
    with pytest.raises(BadInput, match="takes one trace"):
        TraceFacts([trace, trace], write="x")


def test_lengths_only_print_no_rates(tmp_path, capsys):
    (tmp_path / "a.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,100,7\n"
    )
    rows = run(TraceFacts(load_trace(tmp_path / "a.csv")), tmp_path / "r")
    assert not any("hit" in row["name"] for row in rows)
    assert "no hit rates" in capsys.readouterr().out


def test_hit_rate_rows_name_the_definitions(tmp_path, tiny):
    job = HitRate(tiny([0], [0]), ["lru"], [4], partial_blocks="drop", measured=[0.5, 1])
    rows = run(job, tmp_path / "r")
    assert rows[0]["params"]["partial_blocks"] == "drop"
    assert rows[0]["params"]["measured"] == [0.5, 1.0]
    hit = next(row for row in rows if row["name"] == "block_hit_percent")
    assert hit["value"] == 100


def test_the_job_runs_without_an_experiment(tmp_path):
    import hydra

    from kvlab.config import conf_dir

    with hydra.initialize_config_dir(str(conf_dir()), job_name="kvlab", version_base="1.3"):
        where = f"hydra.run.dir={tmp_path / 'run'}"
        plan = make_plan(["job=trace", "trace.path=synthetic", "trace.format=mooncake", where])
        assert plan.variants == [] and plan.config["variants"] == [] and plan.experiment is None
        assert plan.job.traces[0].accesses == 121_877
        plan = make_plan(["job=hit_curve", "experiment=quickstart", where])
        assert plan.variants  # somebody asked for them; the job will refuse
