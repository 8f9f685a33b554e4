"""One command for each figure of reports/README.md: measures, writes the reports, draws the page.

    python experiments/front_page/rebuild.py formats|eviction|windows|prefixes|speed|memory
        [--gguf FOLDER] [--reports reports] [--runs outputs/front_page] [--tiny]

Meant for a CUDA device; half of `prefixes` is a CPU's. What was measured before in --runs is not
measured again. --gguf: where smollm2-135m-instruct.gguf and
qwen2.5-coder-0.5b-instruct.gguf lie, else the models come from a package and the hub. --tiny tries
all of it on a CPU with toys; it writes into another folder of reports only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from kvlab.report import Book, draw_all, pictures

ROOT = Path(__file__).resolve().parents[2]
TOY = ["model=qwen3_0_6b_random", "model.hidden_size=64", "model.layers=2", "model.query_heads=4",
       "model.kv_heads=2", "model.head_dim=32", "model.mlp_size=128", "model.vocabulary=8192",
       "memory.cap_gb=null", "device=cpu"]  # fmt: skip
SHORT = ["eval.documents=2", "eval.tokens=512", "prefill.chunk_tokens=128", "device=cpu"]
LONG = [*TOY, "prefill.chunk_tokens=256", "job.contexts=[2048]", "job.decode_tokens=6"]
ARMS = "fp8_host,int2_mass,int4_mass,window,retrieval"


class Run(NamedTuple):
    """name: of its folder, which reports cite. words: of the command. tiny: those of a dry run."""

    name: str
    words: list[str]
    tiny: list[str]


class Report(NamedTuple):
    """script: makes the report of one run; None: `python -m kvlab.report` of them all."""

    runs: list[Run]
    script: str | None = None
    options: tuple[str, ...] = ()


def both(experiment: str) -> list[Run]:
    """Runs of both real models, each at its length."""
    tiny = ["model=reference", *SHORT, "eval.decode_tokens=4", "prefill.progress=false"]
    return [
        Run("smollm2-135m", [f"experiment={experiment}", "eval=books_8k"], tiny),
        Run("qwen2.5-coder-0.5b", [f"experiment={experiment}", "model=qwen2_5_coder_0_5b",
                                   "eval=books_32k"], tiny),
    ]  # fmt: skip


REPORTS = {
    "real_formats": Report([
        Run("smollm2-135m", ["experiment=real_formats"], ["model=reference", *SHORT]),
        Run("qwen2.5-coder-0.5b", ["experiment=real_formats", "model=qwen2_5_coder_0_5b"],
            ["model=reference", *SHORT]),
    ]),
    "real_axes": Report(both("real_axes")),
    "real_windows": Report(both("real_windows")),
    "hit_rate": Report([Run("hit_rate", ["experiment=hit_rate", "job.compiled=true"],
                            ["job.capacity_blocks=[1000]", "job.budgets_gib=[128]",
                             "job.policies=[lru,arc,mq,s3fifo,adaptive]",
                             "job.budget_policies=[lru]"])], "experiments/hit_rate/report.py"),
    "prefix_ttft": Report([Run("prefix_ttft", ["experiment=prefix_ttft"], [
        *TOY, "job.prefix_tokens=1024", "job.new_tokens=64", "job.chunk_tokens=256"])]),
    "decode_speed": Report([Run("decode_speed", ["experiment=decode_speed"], [
        *TOY, "job.contexts=[256,512]", "job.batches=[1]", "job.steps=16",
        "job.peers=[dynamic eager]"])]),
    "memory_200k": Report([
        Run("memory_200k", ["experiment=memory_200k"], LONG),
        Run("fp8_device", ["experiment=memory_200k", 'variants=["format=fp8"]',
                           "memory.cap_gb=null"], LONG),
    ], "experiments/memory_200k/report.py", ("--arms", ARMS)),
    "ultra_long": Report([Run("ultra_long", ["experiment=ultra_long", "job.contexts=[1000000]"],
                              LONG)], "experiments/memory_200k/report.py",
                         ("--arms", "exact,window")),
}  # fmt: skip
FIGURES = {"formats": ["real_formats"], "eviction": ["real_axes"],
           "windows": ["real_windows"], "prefixes": ["hit_rate", "prefix_ttft"],
           "speed": ["decode_speed"], "memory": ["memory_200k", "ultra_long"]}  # fmt: skip


def measured(run: Run, runs: Path, gguf: Path | None, tiny: bool) -> list[str]:
    """The command that measures into a folder of `runs`, or goes on with what is there."""
    words = run.words
    if gguf and run.name in ("smollm2-135m", "qwen2.5-coder-0.5b") and not tiny:
        file = gguf.resolve() / f"{run.name}-instruct.gguf"
        rest = [word for word in words[1:] if not word.startswith("model=")]
        words = [words[0], "model=gguf", f"model.path={file}", *rest]
    if tiny:  # a word that is given again replaces the first
        keys = {word.partition("=")[0] for word in run.tiny}
        words = [w for w in words if w.partition("=")[0] not in keys] + run.tiny
    folder = runs.resolve() / run.name
    again = ["resume=true"] if folder.exists() else []
    return ["-m", "kvlab", *words, "track=jsonl", *again, f"hydra.run.dir={folder}"]


def reported(name: str, report: Report, runs: Path, reports: Path) -> list[str]:
    """The command that writes the report."""
    folders = [str(runs / run.name) for run in report.runs]
    text, out = f"experiments/{name}/README.md", str(reports / name)
    if report.script is None:
        return ["-m", "kvlab.report", *folders, "--out", out, "--text", text]
    device = ["--device", folders[1]] if len(folders) > 1 else []
    return [report.script, folders[0], out, "--text", text, *report.options, *device]


def commands(
    figure: str, runs: Path, reports: Path, gguf: Path | None = None, tiny: bool = False
) -> list[list[str]]:
    """Arguments of Python, one command after the other."""
    own = {name: REPORTS[name] for name in FIGURES[figure]}
    found = [measured(run, runs / name, gguf, tiny)
             for name, report in own.items() for run in report.runs]  # fmt: skip
    found += [reported(name, report, runs / name, reports) for name, report in own.items()]
    if tiny:  # the advice and its page are of real numbers
        return found
    return [*found, ["experiments/advice/table.py"], ["-m", "kvlab", "pages", str(reports)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--reports", type=Path, default=ROOT / "reports")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "front_page")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny and args.reports.resolve() == ROOT / "reports":
        parser.error("--tiny: give a copy of the reports with --reports")
    if not args.tiny and args.reports.resolve() != ROOT / "reports":
        parser.error("--reports: the advice is made of this repository's; only --tiny has others")
    args.runs.mkdir(parents=True, exist_ok=True)
    for command in commands(args.figure, args.runs.resolve(), args.reports.resolve(), args.gguf,
                            args.tiny):
        print("python", *command, flush=True)
        if status := subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            sys.exit(status)
    if args.tiny:
        shown = [p for p in pictures(Book(args.reports)) if p.stem == args.figure]
        draw_all(shown, args.reports)
        print(f"drew {args.reports / args.figure}.svg" if shown else "nothing to draw")
        sys.exit(not shown)


if __name__ == "__main__":
    main()
