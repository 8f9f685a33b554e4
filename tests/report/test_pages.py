"""What a page says first, what it leaves to the appendix, and how Markdown becomes one file."""

from __future__ import annotations

import json
import re

import pytest
from test_report import MIB, alone, formats_run, quality

from kvlab.core import BadInput, Measurement
from kvlab.report import Book, study, write_report
from kvlab.report.__main__ import main
from kvlab.report.build import FIGURES, LONG
from kvlab.report.entries import entries
from kvlab.report.html import html_page
from kvlab.report.marks import row_names
from kvlab.report.page import without_long_tables
from kvlab.report.source import Run
from kvlab.report.verdict import authors, verdict, without_verdict
from kvlab.track import RunFolder

TEXT = "# Which one?\n\n**Verdict.** This one. By 3.5 %. Not that. And more.\n\n**Question.** Why?"


def many_run(path, count=30):
    with RunFolder(path, config="device: cpu\n") as folder:
        folder.add("full", {"baseline": True}, quality(0, 0, 16 * MIB))
        for i in range(count):
            folder.add(f"lru {i + 1}%", {}, quality(1 + (i * 7) % count, 0.1, (1 + i / 2) * MIB))
    alone(path)
    return path


def test_the_verdict_stands_first_and_has_three_sentences_at_most():
    assert authors(TEXT) == "This one. By 3.5 %. Not that."
    assert authors("**Question.** None yet.") == ""
    page = study(TEXT, ["## Table"])
    assert page.startswith("# Which one?\n\n**Verdict.** This one. By 3.5 %. Not that.\n\n## Table")
    assert "And more." in page  # a longer one stays whole below
    assert study("# Why\n", ["## Table"]) == "# Why\n\n## Table\n"
    short = TEXT.replace(" And more.", "")
    assert without_verdict(short) == "# Which one?\n\n\n\n**Question.** Why?"


def test_without_an_authors_verdict_the_numbers_have_one(tmp_path):
    readme = write_report(formats_run(tmp_path / "run"), tmp_path / "out").read_text()
    first = readme.split("## ")[0]
    assert "Of 2 variants int8 stays nearest to the full cache" in first
    assert "less than 1 % of perplexity, by its interval, takes int8: 0.53" in first
    assert verdict([], [], "") == ""


@pytest.mark.parametrize(("high", "said"), [
    (-0.01, "1 of 1 paired differences are wins"), (0.01, "0 of 1 paired differences are wins")])
def test_controls_are_beaten_outside_the_interval_only(high, said):
    row = {"params": {}, "unit": "", "count": 1, "value": -0.02, "low": -0.03, "high": high,
           "better": "lower", "name": "kl_minus_random_nats", "variant": "snapkv 10%"}  # fmt: skip
    assert said in verdict(entries([Run("run", [row])]), [row], "")


def test_a_long_list_goes_to_the_appendix_and_its_best_stay(tmp_path):
    run = many_run(tmp_path / "run")
    readme = write_report(run, tmp_path / "out", text=TEXT).read_text()
    above, _, appendix = readme.partition("## Appendix")
    rows = [line for line in above.splitlines() if line.startswith("| lru")]
    assert 0 < len(rows) <= LONG and "Summary: " in above and "| full |" in above
    assert len([x for x in appendix.splitlines() if x.startswith("| lru")]) > 3 * 30
    assert "### All that was measured" in appendix and "### Runs" in appendix
    assert above.index("Summary") < above.index("![") < above.index("## Question, method")


def test_a_long_table_of_the_authors_goes_to_the_appendix(tmp_path):
    short, long = ("| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * n for n in (24, 25))
    text = f"# Asked?\n\nFirst.\n\n{short}\nThen.\n\n{long}\nAfter."
    kept, moved = without_long_tables(text)
    assert short in kept and long not in kept and "After." in kept
    assert "Table 1 is in the appendix." in kept
    assert moved == [f"### Table 1 of the findings\n\n{long.strip()}"]


def test_a_study_says_what_was_measured():
    page = study("# How long?\n\n**Verdict.** So.\n\nMore.", ["## Part"], "trace a, 3 requests")
    assert page.startswith("# How long? Trace a, 3 requests\n\n**Verdict.** So.")


def test_six_figures_and_the_rest_on_request(tmp_path):
    run = formats_run(tmp_path / "run")
    with RunFolder(run, config=(run / "config.yaml").read_text(), resume=True) as folder:
        for i, name in enumerate(("bf16", "int8", "fake4")):
            odd = [Measurement(f"odd_{k}", k + i + 1.0, "") for k in range(5)]
            folder.add(name, {"format": name, "tokens": 4096}, odd)
    alone(run)
    readme = write_report(run, tmp_path / "few").read_text()
    assert readme.count("![") == FIGURES == len(list((tmp_path / "few/figures").glob("*.svg")))
    assert "4 more figures are drawn by" in readme
    assert main([str(run), "--out", str(tmp_path / "all"), "--figures", "all"]) == 0
    assert (tmp_path / "all/README.md").read_text().count("![") == 10


def test_a_speed_beside_other_work_has_no_figure(tmp_path):
    run = formats_run(tmp_path / "run")
    facts = (run / "environment.json").read_text()
    (run / "environment.json").write_text(facts.replace('"load_average": 0.0',
                                                        '"load_average": 99.0'))
    write_report(run, tmp_path / "out")
    assert not (tmp_path / "out/figures/speed.svg").exists()


def test_rows_of_a_figure_are_all_told_apart():
    def entry(variant, **params):
        return {"variant": variant, "params": params, "name": "kl_mean_nats", "value": 1.0,
                "unit": "nats", "better": "lower", "low": None, "high": None, "count": 1}

    start, end = "attention_mass 5% ", " summary.ratio=0.02"
    rows = [entry(start + kind + end) for kind in ("merged", "fitted", "merge_mean")]
    rows += [entry("int4", tokens=t) for t in (100, 200)]
    told = row_names(entries([Run("run", rows)]))
    assert len(set(told)) == 5 and told[-1] == "int4, 200 tokens"
    assert told[0] == "attention mass, 5 %, merged, 0.02 of the tokens as entries"


def test_markdown_becomes_one_file_with_cards_and_anchors(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/a.svg").write_text('<?xml version="1.0"?>\n<svg><g id="x"/></svg>')
    page = html_page(
        "# A `b` & c\n\n<script>x</script>\n\n| goal | loss |\n| --- | ---: |\n"
        "| facts | 1.0 [0.5, 1e-05] |\n| chat |  |\n\n![A](figures/a.svg)\n\n[up](#a-b--c)\n",
        tmp_path)  # fmt: skip
    assert "<script" not in page and "&lt;script&gt;" in page
    assert '<h1 id="a-b--c">' in page and "<title>A b &amp; c</title>" in page
    assert 'data-label="loss"' in page and 'class="none"' in page
    assert "[0.5,\u00a01e-\u206005]" in page  # an interval and an exponent stay on one line
    assert '<figure><svg role="img" aria-label="A"><g id="a-x"/></svg></figure>' in page
    [width] = set(re.findall(r'<table class="w(\d+)"', page))
    assert f"@container (max-width:{width}px)" in page


@pytest.mark.parametrize("bad", [b'{"variant": "a", "para', b"[1]", b"\xff\xfe", b'"name params"',
                                 b'{"name": "bits", "params": {}}'])  # fmt: skip
def test_a_damaged_row_of_a_committed_report_is_named(tmp_path, bad):
    (tmp_path / "one").mkdir()
    row = b'{"variant": "a", "name": "bits", "params": {}, "value": 4}'
    lines = [row, b'{"of": "another kind"}', b"", row, bad]
    (tmp_path / "one" / "results.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(BadInput, match=r"one/results\.jsonl:5: "):
        Book(tmp_path).find("one", "bits")
    (tmp_path / "one" / "results.jsonl").write_bytes(b"\n".join(lines[:-1]) + b"\n")
    assert [found["line"] for found in Book(tmp_path).find("one", "bits", value=4)] == [1, 4]


def lossy_run(path, losses):
    with RunFolder(path, config="device: cpu\n") as folder:
        folder.add("full", {"baseline": True, "tokens": 10}, quality(0, 0, 16 * MIB))
        for name, loss in losses.items():
            folder.add(name, {"tokens": 10}, quality(loss, 0.1, 8 * MIB))
    alone(path)
    return path


def test_variants_that_come_out_as_one_cache_are_told(tmp_path):
    run = lossy_run(tmp_path / "run", {"sinks=1": 2.5, "sinks=4": 2.5, "sinks=17": 2.4,
                                       "none": 0.0, "nothing": 0.0})  # fmt: skip
    readme = write_report(run, tmp_path / "out").read_text()
    told = {line.split(" | ")[0] for line in readme.splitlines()
            if "lost the very same as sinks=1: one cache by two names" in line}
    assert told == {"| sinks=4"} and readme.count("lost the very same") == 1


def test_the_title_says_where_all_of_it_was_measured_without_a_gpu(tmp_path):
    run = lossy_run(tmp_path / "run", {"one": 1.0})
    title = write_report(run, tmp_path / "out", text="# Why?").read_text().splitlines()[0]
    assert title.endswith(", CPU")
    environment = json.loads((run / "environment.json").read_text())
    environment["device"] = {"kind": "cuda", "name": "NVIDIA H200"}
    (run / "environment.json").write_text(json.dumps(environment))
    title = write_report(run, tmp_path / "other", text="# Why?").read_text().splitlines()[0]
    assert "CPU" not in title
