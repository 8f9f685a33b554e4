"""README's five sections as a new user runs them, timed: a clone, a new environment, CPU.

    python experiments/first_hour/walk.py [SCRATCH] [--env ENV] [--only 3]

Commands are read out of README.md, so that what is timed is what stands there; only what a reader
has to fill in (a checkpoint, a text, a trace, DATE/TIME) is filled in here, from what is bundled.
Installing is timed apart. Wall seconds depend on what else the machine does; CPU seconds (user and
system, children included) hardly do. Writes SCRATCH/walk.jsonl as it goes and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 900  # seconds of a command, and the aim for all of them


def sections(readme: str) -> dict[int, list[tuple[str, str]]]:
    """Of each numbered section ("shell" or "python", text), in order."""
    found = {}
    for part in re.split(r"^## ", readme, flags=re.M)[1:]:
        number = re.match(r"(\d+)\. ", part)
        if number:
            found[int(number[1])] = list(commands(part))
    return found


def commands(text: str):
    """Blocks of Python, and indented shell commands, lines that end in a backslash joined."""
    held: list[str] = []
    code: list[str] | None = None
    for line in text.splitlines():
        if line.startswith("```"):
            if code:
                yield "python", "\n".join(code)
            code = [] if line == "```python" else None
        elif code is not None:
            code.append(line)
        elif line.startswith("    "):
            held.append(line.strip().removesuffix("\\"))
            if not line.endswith("\\"):
                yield "shell", " ".join(held)
                held = []


def filled(command: str, latest: dict[str, Path], scratch: Path) -> str:
    """With what a reader has to fill in."""
    for given, own in (("/path/to/checkpoint", scratch / "checkpoint"),
                       ("/path/to/book.txt", scratch / "book.txt"),
                       ("my_trace.jsonl.xz", scratch / "traces" / "my_trace.jsonl.xz"),
                       ("outputs/DATE/TIME", latest.get("outputs")),
                       ("multirun/DATE/TIME", latest.get("multirun"))):  # fmt: skip
        command = command.replace(given, str(own))
    return command


def prepare(scratch: Path) -> None:
    """A checkpoint, a text and a trace of the reader's own: copies of what is bundled."""
    script = """
import json, lzma, pathlib, shutil, sys
assets, out = pathlib.Path("kvlab/assets").resolve(), pathlib.Path(sys.argv[1])
shutil.copytree(assets / "reference", out / "checkpoint", dirs_exist_ok=True)
with lzma.open(assets / "books" / "heldout.jsonl.xz", "rt") as lines:
    (out / "book.txt").write_text(json.loads(next(lines))["text"])
(out / "traces").mkdir(exist_ok=True)
with lzma.open(assets / "traces" / "mooncake_conversation.jsonl.xz", "rt") as lines:
    with lzma.open(out / "traces" / "my_trace.jsonl.xz", "wt") as own:
        own.writelines(line for _, line in zip(range(2000), lines))
"""
    subprocess.run([sys.executable, "-c", script, str(scratch)], cwd=scratch / "kvlab", check=True)


def timed(line: list[str] | str, cwd: Path, env: dict, log: Path) -> dict:
    """Wall and CPU seconds of a command and its children, and how it ended."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("a") as out:
        out.write(f"\n$ {line}\n")
        out.flush()
        process = subprocess.Popen(line, shell=isinstance(line, str), cwd=cwd, env=env, stdout=out,
                                   stderr=out, start_new_session=True)  # fmt: skip
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            status = process.wait() and 124
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(time.perf_counter() - started, 1), "cpu": round(cpu, 1), "status": status,
            "load": os.getloadavg()[0]}  # fmt: skip


def newest(folder: Path) -> Path | None:
    """The run that was begun last, two folders down."""
    runs = sorted(folder.glob("*/*"), key=lambda path: path.stat().st_mtime)
    return runs[-1] if runs else None


def walk(scratch: Path, env: Path | None, only: int | None) -> list[dict]:
    clone, log, rows = scratch / "kvlab", scratch / "walk.log", []

    def note(section: str, command: str, told: dict) -> None:
        rows.append({"section": section, "command": command, **told})
        with (scratch / "walk.jsonl").open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(f"{section:8} {told['wall']:7.1f} s wall {told['cpu']:7.1f} s CPU  "
              f"{'' if told['status'] == 0 else 'STATUS ' + str(told['status']) + '  '}"
              f"{command.splitlines()[0][:90]}", flush=True)  # fmt: skip

    if not clone.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    prepare(scratch)
    fresh = env is None
    if fresh:
        env = scratch / "env"
        for line in ([sys.executable, "-m", "venv", str(env)],
                     [str(env / "bin/pip"), "install", "-q", "-e", "."]):  # fmt: skip
            note("install", " ".join(line), timed(line, clone, dict(os.environ), log))
    own = {**os.environ, "PATH": f"{env / 'bin'}:{os.environ['PATH']}",
           "VIRTUAL_ENV": str(env), "PYTHONPATH": str(clone)}  # fmt: skip
    before = ""  # the Python so far: a later block goes on where the last one ended
    for number, found in sections((clone / "README.md").read_text(encoding="utf-8")).items():
        for kind, text in found:
            if kind == "python":
                before, wanted = f"{before}\n{text}", ["python", "-c", f"{before}\n{text}"]
            else:
                latest = {name: newest(clone / name) for name in ("outputs", "multirun")}
                wanted = filled(text.partition("  #")[0], latest, scratch)
            if only in (None, number) and (fresh or not text.startswith("pip ")):
                note(f"{number}", text, timed(wanted, clone, own, log))
    return rows


def table(rows: list[dict]) -> str:
    """Markdown, a line for each section and one for all that are numbered."""
    lines = ["| section | commands | failed | CPU, s | wall, s |", "|---|---:|---:|---:|---:|"]
    names = dict.fromkeys(row["section"] for row in rows)
    parts = {name: [r for r in rows if r["section"] == name] for name in names}
    parts["1 to 5"] = [row for row in rows if row["section"] != "install"]
    for name, own in parts.items():
        failed = sum(row["status"] != 0 for row in own)
        lines.append(f"| {name} | {len(own)} | {failed} | {sum(r['cpu'] for r in own):.0f} | "
                     f"{sum(r['wall'] for r in own):.0f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, nargs="?", help="a folder, default a new one")
    parser.add_argument("--env", type=Path, help="an environment that has kvlab's requirements, "
                        "numba and joblib; nothing is installed into it")
    parser.add_argument("--only", type=int, help="the number of one section")
    args = parser.parse_args()
    scratch = (args.scratch or Path(tempfile.mkdtemp(prefix="walk"))).resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    rows = walk(scratch, args.env and args.env.resolve(), args.only)
    print(f"\n{table(rows)}\n\nrows and output in {scratch}")
    sys.exit(any(row["status"] for row in rows))


if __name__ == "__main__":
    main()
