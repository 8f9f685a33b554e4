"""A report from results files alone: what it says, what it draws, what it refuses."""

import html.parser
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from kvlab.core import BadInput, Measurement
from kvlab.report import console_table, write_report
from kvlab.report.__main__ import main
from kvlab.report.entries import entries
from kvlab.report.figures import drawings
from kvlab.report.names import byte_unit, interval, metric, number
from kvlab.report.source import Run, load
from kvlab.track import RunFolder, read_rows

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


def quality(loss, width, allocated, speed=30.0):
    return [
        Measurement("perplexity_delta_percent", loss, "%", "lower", loss - width, loss + width, 9),
        Measurement("kl_mean_nats", loss / 500, "nats", "lower", loss / 600, loss / 400, 9),
        Measurement("top1_agreement_percent", 100 - loss, "%", "higher", 99 - loss, 100.0, 9),
        Measurement("cache_nominal_bytes", allocated * 0.9, "bytes", "lower"),
        Measurement("cache_logical_bytes", allocated * 0.95, "bytes", "lower"),
        Measurement("cache_allocated_bytes", allocated, "bytes", "lower"),
        Measurement("peak_device_bytes", 500 * MIB + allocated, "bytes", "lower"),
        Measurement("decode_tokens_per_second", speed, "tokens/s", "higher", speed - 1, speed + 1),
        Measurement("prefill_tokens_per_second", 90 * speed, "tokens/s", "higher"),
    ]


def alone(path):
    """Whatever else this machine does now: nothing did when the run was made."""
    facts = json.loads((path / "environment.json").read_text())
    facts["host"]["load_average"] = 0.0
    (path / "environment.json").write_text(json.dumps(facts))


def formats_run(path, model="kvlab.model.load.ReferenceModel"):
    config = f"device: cpu\nmodel: {{_target_: {model}}}\n"
    position = np.linspace(100, 4000, 8)
    with RunFolder(path, config=config) as folder:
        for name, loss, size in (("bf16", 0, 16), ("int8", 0.01, 8.5), ("fake4", 0.4, 16)):
            params = {"format": name, "tokens": 4096}
            folder.add(name, params, quality(loss, 0.1 * loss, size * MIB))
            curve = np.full(8, loss / 100)
            rows = {"nll_delta": curve, "low": curve - 1e-4, "high": curve + 1e-4}
            folder.curve("per_position", name, position, **rows)
    alone(path)
    return path


def growth_run(path):
    with RunFolder(path, config="device: cpu\n") as folder:
        for tokens in (100, 1000, 100_000):
            for name, ratio in (("bf16", 1.0), ("int4", 0.3)):
                size = Measurement("cache_allocated_bytes", tokens * 1e4 * ratio, "bytes", "lower")
                odd = Measurement("smoothness", tokens**0.5, "points", None, 1.0, 1e3)
                folder.add(name, {"format": name, "tokens": tokens}, [size, odd])
    return path


def small_run(path, model="x", value=1.0):
    """One measurement of two variants: a report without figures."""
    with RunFolder(path, config=f"model: {model}\n") as folder:
        for name in ("lru", "fifo"):
            folder.add(name, {}, [Measurement("block_hit_percent", value, "%", "higher")])
    return path


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A run and its report, for tests that only read them."""
    run = formats_run(tmp_path_factory.mktemp("runs") / "quick")
    return run, write_report(run, run.parent / "out").parent


def test_the_page_says_what_was_measured_and_where(quick):
    run, out = quick
    readme = (out / "README.md").read_text()
    facts = json.loads((run / "environment.json").read_text())
    for told in (
        facts["date"],
        facts["device"]["name"],
        str(facts["commit"])[:12],
        "reference model",
    ):
        assert told in readme
    assert "| int8 | 0.0100 [0.0090, 0.0110] | 8.50 (0.53×) |" in readme
    fake = next(line for line in readme.splitlines() if line.startswith("| fake4"))
    assert fake.endswith("no bytes saved |")
    assert "perplexity change, % ↓" in readme and "top-1 agreement, % ↑" in readme
    assert "random weights" not in readme


def test_figures_are_drawn_as_svg_and_png_and_named_on_the_page(quick):
    _, out = quick
    stems = ["memory", "per_position", "quality_vs_bytes", "speed", "top1_agreement_percent"]
    assert sorted(p.stem for p in (out / "figures").glob("*.svg")) == stems
    for stem in stems:
        assert f"figures/{stem}.svg" in (out / "README.md").read_text()
        assert (out / f"figures/{stem}.png").read_bytes().startswith(b"\x89PNG")


class Reader(html.parser.HTMLParser):
    """Collects what a browser would fetch and the ids of a page; open tags must close."""

    VOID = {"meta", "br", "img", "link"}

    def __init__(self):
        super().__init__()
        self.fetched, self.ids, self.open, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.open += [tag] if tag not in self.VOID else []
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.fetched.append(value)
            self.ids += [value] if name == "id" else []
        self.fetched += [tag] if tag in ("script", "link", "img", "iframe") else []

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open = self.open[:-1] if tag not in self.VOID else self.open

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_stands_alone(quick):
    page = (quick[1] / "index.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.fetched == [] and reader.open == []
    assert len(reader.ids) == len(set(reader.ids)) > 100
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert used <= set(reader.ids)
    assert page.count("<svg role=") == 5 and "url(http" not in page
    assert "0.0100 [0.0090, 0.0110]" in reader.text


def test_what_failed_is_listed_with_its_reason_until_it_is_made_good(tmp_path, monkeypatch):
    monkeypatch.setattr("kvlab.report.build.drawings", lambda everything, runs: [])
    with RunFolder(tmp_path / "run", config="device: cpu\n") as folder:
        for name in ("bf16", "int4"):
            first = Measurement("document_perplexity", 7.5, "")
            folder.add(name, {"format": name}, [first], step=1)
        folder.add("bf16", {"format": "bf16"}, quality(0, 0.0, 16 * MIB))
        with folder.surviving("int4", {"format": "int4"}, "kl_mean_nats"):
            raise RuntimeError("singular [red]matrix")
    out = write_report(tmp_path / "run", tmp_path / "out").parent
    page = (out / "README.md").read_text()
    assert "| int4 | RuntimeError: singular [red]matrix |" in page and "document" not in page
    assert re.search(r"^\| int4 +\| failed \|", page, re.M)
    again = write_report(out, tmp_path / "again").read_text()
    assert "| int4 | RuntimeError: singular [red]matrix |" in again
    console = Console(file=io.StringIO(), width=80)
    console.print(console_table(load([tmp_path / "run"])[0].rows))
    shown = console.file.getvalue()
    assert re.search(r"^int4 +failed", shown, re.M)
    assert "failed: int4: RuntimeError: singular [red]matrix" in " ".join(shown.split())
    with RunFolder(tmp_path / "run", config="device: cpu\n", resume=True) as folder:
        folder.add("int4", {"format": "int4"}, quality(1, 0.1, 4 * MIB))
    page = write_report(tmp_path / "run", out).read_text()
    assert "## Failed" not in page and "| failed |" not in page


def test_hostile_names_are_shown_as_they_are(tmp_path):
    name = "<script>alert(1)</script> $x_1$ | `a` 日本 " + "long " * 20
    with RunFolder(tmp_path / "run", config="device: cpu\n") as folder:
        for i, variant in enumerate(["bf16", name, name + "2"]):
            params = {"format": variant, "tokens": 1}
            folder.add(variant, params, [*quality(i, 0.5, 1e6 * (i + 1))])
            folder.add(variant, params, [Measurement("<i>odd</i>/../x", 2.0**i, "<u>")])
    out = write_report(tmp_path / "run", tmp_path / "out", title="<b>&").parent
    page = (out / "index.html").read_text()
    assert "<script" not in page and "<i>odd" not in page and "<b>&" not in page
    row = next(x for x in (out / "README.md").read_text().splitlines() if x.startswith("| \\<scr"))
    assert "$x\\_1$ \\| \\`a\\`" in row
    drawn = {p.name for p in (out / "figures").iterdir()}
    assert "i_odd__i_____x.svg" in drawn


def test_random_weights_carry_a_banner(tmp_path):
    run = small_run(tmp_path / "run", model="{_target_: kvlab.model.load.RandomModel}")
    out = write_report(run, tmp_path / "out").parent
    for page in ("README.md", "index.html"):
        assert "random weights: memory and speed only" in (out / page).read_text()


def test_values_over_a_numeric_setting_become_lines(tmp_path):
    out = write_report(growth_run(tmp_path / "grow"), tmp_path / "out").parent
    stems = {p.stem for p in (out / "figures").glob("*.svg")}
    assert stems == {"cache_allocated_bytes", "smoothness"}
    readme = (out / "README.md").read_text()
    assert "| int4 | 100,000 | 286.1 (0.30×) |" in readme
    assert "Smoothness, points, over tokens; bars are 95 % intervals (smoothness)." in readme


def test_several_runs_and_a_sweep(tmp_path):
    for job in (0, 1, 10):
        config = f"cache:\n  block_size: {16 + job}\n"
        with RunFolder(tmp_path / f"sweep/{job}", config=config) as folder:
            folder.add("bf16", {}, quality(0, 0, 16 * MIB))
            folder.add("int4", {}, quality(0.1 + job, 0.1, 4 * MIB + job))
    grow = growth_run(tmp_path / "grow")
    runs = load([tmp_path / "sweep"])
    assert [run.label for run in runs] == ["block_size=16", "block_size=17", "block_size=26"]
    readme = write_report([tmp_path / "sweep", grow], tmp_path / "out").read_text()
    assert "sweep/10" in readme and "grow" in readme and "4 runs" in readme


def test_a_report_rebuilds_from_its_own_results(quick, tmp_path):
    runs = [quick[0], small_run(tmp_path / "small")]
    first = write_report(runs, tmp_path / "first", title="T").parent
    params = read_rows(first / "results.jsonl")[0][0]["params"]
    assert params["run"] == "quick" and params["tokens"] == 4096
    assert {"commit", "device"} <= params.keys()
    second = write_report(first, tmp_path / "second", title="T").parent
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    for file in files:
        if file.suffix != ".npz":
            assert (first / file).read_bytes() == (second / file).read_bytes(), file
    alone = tmp_path / "alone/results.jsonl"
    alone.parent.mkdir()
    alone.write_bytes((first / "results.jsonl").read_bytes())
    assert [run.device for run in load([alone])] == [params["device"]] * 2


def test_figures_that_are_gone_are_removed(tmp_path):
    out = write_report(growth_run(tmp_path / "grow"), tmp_path / "out").parent
    (out / "figures/mine.svg").write_text("kept")
    write_report(small_run(tmp_path / "small"), out)
    assert [p.name for p in (out / "figures").iterdir()] == ["mine.svg"]


def test_numbers_that_are_not_finite_do_not_stop_a_report(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        for name, value in (("bf16", 0.0), ("int2", np.nan), ("int3", np.inf)):
            folder.add(name, {}, [m._replace(value=value) for m in quality(0, 1, MIB)])
    readme = write_report(tmp_path / "run", tmp_path / "out").read_text()
    assert "NaN" in readme and "∞" in readme


def broken(tmp_path, what):
    run = formats_run(tmp_path / "run")
    match what:
        case "absent":
            return tmp_path / "nowhere"
        case "no measurements":
            (run / "measurements.jsonl").unlink()
        case "empty":
            (run / "measurements.jsonl").write_text("")
        case "only a torn line":
            (run / "measurements.jsonl").write_text('{"variant": "a", "na')
        case "a broken line":
            text = (run / "measurements.jsonl").read_text()
            (run / "measurements.jsonl").write_text("[1, 2]\n" + text)
        case "not text":
            (run / "measurements.jsonl").write_bytes(b"\xff\x00\n" * 5)
        case "environment":
            (run / "environment.json").write_text("{")
        case "config":
            (run / "config.yaml").write_text("a: [")
        case "curves":
            (run / "per_position.npz").write_bytes(b"PK nothing")
        case "shapes":
            np.savez(run / "per_position.npz", position=[1], variants=["a"], nll_delta=[1])
    return run


BROKEN = (
    *("absent", "no measurements", "empty", "only a torn line", "a broken line", "not text"),
    *("environment", "config", "curves", "shapes"),
)


@pytest.mark.parametrize("what", BROKEN)
def test_results_that_cannot_be_used_are_refused_in_one_line(tmp_path, capsys, what):
    run = broken(tmp_path, what)
    assert main([str(run), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("kvlab.report: ") and str(run) in said.err
    assert not (tmp_path / "out").exists()


def test_a_torn_last_line_is_left_out(tmp_path):
    run = small_run(tmp_path / "run")
    whole = (run / "measurements.jsonl").read_bytes()
    (run / "measurements.jsonl").write_bytes(whole[:-20])
    readme = write_report(run, tmp_path / "out").read_text()
    assert "lru" in readme and "fifo" not in readme
    assert (run / "measurements.jsonl").read_bytes() == whole[:-20]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="out="):
        write_report(small_run(tmp_path / "run"), tmp_path / "file/out")


def test_the_command_runs_without_torch(tmp_path):
    run = growth_run(tmp_path / "run")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from kvlab.report.__main__ import main\n"
        f"sys.exit(main([{str(run)!r}, '--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out/index.html").is_file()
    module = [sys.executable, "-m", "kvlab.report", str(tmp_path / "none")]
    done = subprocess.run(module, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def rendered(rows, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(console_table(rows, width=width))
    return console.export_text()


def test_the_console_table_fits_80_columns(tmp_path):
    rows, _ = read_rows(formats_run(tmp_path / "run") / "measurements.jsonl")
    text = rendered(rows)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for told in (
        "8.50 (0.53×)",
        "0.0100 [0.0090, 0.0110]",
        "fake4 *",
        "* no bytes saved",
        "KL mean",
    ):
        assert told in text
    assert "decode" in rendered(rows, width=120)
    assert "8.50 (0.53×)" in rendered(rows, width=50)


def test_the_console_table_takes_any_measurements():
    hits = {
        "variant": "lru",
        "params": {"capacity": 10},
        "name": "token_hit_percent",
        "value": 42.0,
    }
    hits |= {"unit": "%", "better": "higher", "low": None, "high": None, "count": 5}
    more = {**hits, "params": {"capacity": 20}, "value": 55.5}
    text = rendered([hits, more])
    assert "capacity" in text and "55.50" in text and "token hits, %" in text
    long = {**hits, "variant": "a very long variant name " * 8}
    assert max(map(len, rendered([long]).splitlines())) <= 80


def test_what_the_job_measures_comes_first_and_what_a_slab_hides_is_said():
    def rows(variant, score, in_use):
        told = {"variant": variant, "params": {"task": "mine", "baseline": variant == "full"},
                "better": None}  # fmt: skip
        yield told | {"name": "mine_percent", "value": score, "low": score - 1, "high": score + 1,
                      "unit": "%"}  # fmt: skip
        for name, value in (("cache_allocated_bytes", 2**20), ("cache_logical_bytes", in_use)):
            yield told | {"name": name, "value": value, "low": None, "high": None, "unit": "B"}

    lines = rendered([*rows("full", 90.0, 2**19), *rows("lru 50%", 80.0, 2**18)]).splitlines()
    assert lines[0].split() == ["variant", "mine,", "%", "allocated,", "MiB", "↓", "in", "use,",
                                "KiB", "↓"]  # fmt: skip
    assert lines[2].split()[:3] == ["lru", "50%", "*"] and lines[2].split()[-1] == "256.0"
    assert "task mine" in lines[3] and "1,024 tokens saved" in lines[-1]


def test_the_reason_of_a_failure_is_as_wide_as_the_terminal():
    told = {"variant": "full", "params": {}, "name": "failed", "reason": "because " * 8,
            "value": 0, "low": None, "high": None, "unit": "", "better": None}  # fmt: skip
    assert "failed: full: " + "because " * 7 in rendered([told])


def test_baselines_are_found_under_the_same_conditions():
    def row(variant, value, **params):
        told = {"variant": variant, "params": params, "name": "cache_allocated_bytes"}
        return {**told, "value": value, "low": None, "high": None, "unit": "bytes", "better": None}

    rows = [
        *(row("int4", 30.0, tokens=1, format="int4"), row("int4", 60.0, tokens=2, format="int4")),
        *(row("bf16", 100.0, tokens=1, format="bf16"), row("bf16", 120.0, tokens=2, format="bf16")),
    ]
    found = entries([Run("r", rows)])
    assert [entry.bytes_ratio for entry in found] == [0.3, 0.5, 1, 1]
    assert [entry.conditions for entry in found][:2] == [{"tokens": 1}, {"tokens": 2}]
    assert [entry.notes for entry in found][2:] == [["baseline"]] * 2
    alone = entries([Run("r", rows[:2])])
    assert alone[0].baseline is None and alone[0].notes == []


@pytest.mark.parametrize(
    "value,low,high,text",
    [
        (0.0213, 0.0101, 0.0331, "0.021 [0.010, 0.033]"),
        (99.914, 99.81, 100, "99.91 [99.81, 100.00]"),
        (1.13e-5, 9.9e-6, 1.04e-4, "0.00001 [0.00001, 0.00010]"),
        (2.24e-6, 2e-6, 2.4e-6, "2.2e-06 [2.0e-06, 2.4e-06]"),
        (0.0, 0.0, 0.0, "0 [0, 0]"),
        (1234567.0, None, None, "1,234,567"),
        (8.48, None, None, "8.48"),
        (0.00045, None, None, "0.000450"),
        (float("nan"), None, None, "NaN"),
        (-float("inf"), None, None, "-∞"),
    ],
)
def test_numbers_are_written_with_the_digits_they_have(value, low, high, text):
    assert interval(value, low, high) == text


def test_units():
    assert byte_unit(3.5 * MIB) == (MIB, "MiB")
    assert byte_unit(0) == byte_unit(float("nan")) == (1.0, "B")
    assert metric("x_ms")[1:3] == ("x", "ms")
    assert metric("swaps", "1/h", "lower")[1:] == ("swaps", "1/h", "Other", "lower")
    assert number(1e20) == "1.0e+20"


def test_a_variant_looks_the_same_in_every_panel(monkeypatch):
    """The full cache has no divergence: its absence must not move the others' colours."""
    from kvlab.report import canvas, marks

    seen = {}

    class Point:
        def __init__(self, variant, names):
            self.variant, self.conditions = variant, {}
            self.rows = {n: {"value": 1.0, "low": None, "high": None} for n in names}
            self.run = type("Run", (), {"name": "r", "label": "r"})

        def value(self, name):
            return self.rows[name]["value"]

    everything = [Point("bf16", ["a"]), Point("int8", ["a", "b"]), Point("int4", ["a", "b"])]
    monkeypatch.setattr(canvas, "rescale", lambda *a, **k: None)
    monkeypatch.setattr(canvas, "name_ends", lambda _axes, ends: [
        seen.setdefault(label, set()).add(colour) for _, _, label, colour in ends])
    monkeypatch.setattr(marks, "_label_axis", lambda *a: None)
    monkeypatch.setattr(marks, "scaling", lambda *a: (1.0, ""))
    monkeypatch.setattr(marks, "_error_bars", lambda *a: None)
    monkeypatch.setattr(marks, "_noise", lambda *a: 0.0)
    for name in "ab":
        points = [e for e in everything if name in e.rows]
        marks.series(canvas.figure()[1][0], points, name, lambda e: 1.0, everything)
    assert {len(colours) for colours in seen.values()} == {1} and len(seen) == 3


def test_long_lines_are_figures_where_as_many_bars_would_be_none(tmp_path):
    """A report of 51 places lost all its figures: nine series over five lengths are nine lines."""
    with RunFolder(tmp_path / "run", config="device: cpu\n") as run:
        for variant in range(9):
            for tokens in (1, 2, 4, 8, 16):
                took = Measurement("decode_ms", variant + tokens, "ms", "lower")
                run.add(f"v{variant}", {"tokens": tokens}, [took])
    alone(tmp_path / "run")
    write_report(tmp_path / "run", tmp_path / "report")
    assert (tmp_path / "report/figures/decode_ms.svg").is_file()


def test_headings_are_words_and_fewer_evictions_are_better():
    assert metric("kl_minus_fifo_nats").heading == "KL mean minus fifo's"
    assert metric("kl_minus_fifo_nats").unit == "nats"
    assert metric("evictions_per_second").better == "lower"  # as the simulator says


def test_what_is_set_twice_alike_is_said_once():
    twice = load([Path(__file__).resolve().parents[2] / "reports/kernel_quality"])
    assert [run.label for run in twice] == ["baseline=int4", "baseline=fp8"]


def test_runs_that_varied_budgets_have_a_figure_each(tmp_path):
    """Two models' losses were one line, to and fro."""
    for model in ("small", "large"):
        with RunFolder(tmp_path / model, config="device: cpu\n") as run:
            run.add("full", {"baseline": True}, [
                Measurement("cache_logical_bytes", 1e6, "bytes", "lower")])  # fmt: skip
            for percent in (50, 25):
                run.add(f"snapkv {percent}%", {}, [
                    Measurement("cache_logical_bytes", 1e4 * percent, "bytes", "lower"),
                    Measurement("kl_mean_nats", 1.0 / percent, "nats", "lower")])  # fmt: skip
    write_report([tmp_path / "small", tmp_path / "large"], tmp_path / "report")
    found = {f.stem for f in (tmp_path / "report/figures").glob("loss_by_budget*.svg")}
    assert found == {"loss_by_budget-small", "loss_by_budget-large"}


def test_a_number_that_follows_from_another_makes_no_panels(tmp_path):
    """Requests and their prompt tokens: every panel had one point of each variant."""
    with RunFolder(tmp_path / "run", config="device: cpu\n") as run:
        for requests in (64, 256):
            for variant in ("a", "b"):
                took = Measurement("waits", requests + len(variant), "requests", "lower")
                run.add(variant, {"requests": requests, "prompt_tokens": 7 * requests}, [took])
    [drawing] = figures_of(tmp_path / "run")
    axes = drawing.draw().axes
    assert len(axes) == 1 and axes[0].get_xlabel() == "requests"


def test_points_that_make_no_line_are_no_axis(tmp_path):
    """Two models, each at a length of its own: forty names hung on two columns of points."""
    for model, tokens in (("small", 8192), ("large", 32768)):
        with RunFolder(tmp_path / model, config="device: cpu\n") as run:
            for variant in range(25):
                took = Measurement("waits", variant + tokens, "requests", "lower")
                run.add(f"v{variant}", {"model": model, "tokens": tokens}, [took])
    assert not figures_of(tmp_path / "small", tmp_path / "large")


def figures_of(*folders):
    runs = load(list(folders))
    return drawings(entries(runs), runs)
