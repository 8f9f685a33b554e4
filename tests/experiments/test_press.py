"""Methods of ours beside kvpress's: what each arm keeps, and tables of rows."""

import json
import sys
from pathlib import Path

import pytest

PRESS = Path(__file__).resolve().parents[2] / "experiments" / "press"


@pytest.fixture(scope="module")
def press():
    """The scripts, which import one another by their own names."""
    sys.path.insert(0, str(PRESS))
    try:
        import methods
        import table

        yield methods, table
    finally:
        sys.path.remove(str(PRESS))
        for name in ("methods", "table"):
            sys.modules.pop(name, None)


def test_at_its_own_granularity_each_head_chooses_tokens(press):
    methods, _ = press
    for name, method in methods.METHODS.items():
        spec = methods.spec_of(name, "head", 0.25, 1024)
        if name == "window":
            assert spec.window.recent + spec.window.sinks == 256 and not spec.window.middle
            continue
        assert (spec.evict, spec.groups, spec.block_size) == ("token", "per_head", 1)
        kept = sum(end - begin for begin, end in spec.window.protected(1024))
        floor = max(1, method.recent) if method.sinks or method.recent else 0
        assert kept == method.sinks + floor, "what kvpress never gives up, and no more"
        assert spec.granularity in ("", "(within each layer)")


def test_coarser_ones_where_they_mean_something(press):
    methods, _ = press
    found = {g: methods.spec_of("snapkv", g, 0.5, 1024) for g in methods.GRAINS}
    assert {(s.evict, s.groups, s.block_size) for s in found.values()} == {
        (g.evict, g.groups, g.block or 1) for g in methods.GRAINS.values()}
    assert methods.spec_of("snapkv adakv", "layer", 0.5, 1024) is None
    assert methods.spec_of("window", "all", 0.5, 1024) is None


def loss(who, values, grain="head"):
    return {"kind": "losses", "model": "m", "context": 8, "device": "cpu", "who": who,
            "method": "snapkv", "kept": 50.0, "grain": grain, "kl": values}


def test_losses_are_paired_by_token(press):
    _, table = press
    theirs = [[0.1, 0.3] * 64, [0.2, 0.2] * 64]
    worse = [[1.1 * x for x in book] for book in theirs]
    text = "\n".join(table.pages([loss("kvpress", theirs), loss("kvlab", worse)]))
    assert "| 10" in text
    assert "| yes |" in text
    same = "\n".join(table.pages([loss("kvpress", theirs), loss("kvlab", theirs)]))
    assert "| no |" in same


def test_scores_are_paired_by_item_and_what_stopped_has_fewer(press, tmp_path, monkeypatch):
    _, table = press
    def row(who, method, item, score, kept=1.0):
        return {"kind": "task", "model": "m", "task": "t", "length": 8, "dtype": "float32",
                "who": who, "method": method, "kept": kept, "grain": "head", "item": item,
                "score": score, "bytes": 1_000_000, "freed": who == "kvlab", "seconds": 0.1}

    rows = [row(who, "full", n, 1.0) for who in ("kvlab", "kvpress") for n in "abc"]
    rows += [row("kvpress", "snapkv", n, 1.0, 0.5) for n in "abc"]
    rows += [row("kvlab", "snapkv", n, 0.0, 0.5) for n in "ab"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(sys, "argv", ["table.py", str(file), "--out", str(tmp_path / "t.md")])
    table.main()
    lines = (tmp_path / "t.md").read_text().splitlines()
    ours = next(x for x in lines if x.startswith("| snapkv | 0.5 | kvlab"))
    assert ours.split("|")[6].strip().startswith("-100") and ours.rstrip(" |").endswith("2")
    assert "1.00 masked" in next(x for x in lines if x.startswith("| snapkv | 0.5 | kvpress"))
