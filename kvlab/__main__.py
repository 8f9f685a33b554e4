"""`python -m kvlab [experiment=NAME] [group=option ...] [key=value ...]`: one run, start to end;
`python -m kvlab list [GROUP ...]` and `GROUP=list`: what there is to choose from;
`python -m kvlab advise model=... device.memory_gb=16 context=131072`: which cache to choose;
`python -m kvlab pages [FOLDER]`: the front page of a folder of reports.

Exit status: 0 done, 1 some variants failed (the report says which and why), 2 bad input (one
paragraph on stderr, nothing left behind), 130 interrupted.
Torch is imported by the jobs that compute with it, not here.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size

import hydra
import numpy as np
import yaml
from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from kvlab import __version__, axes
from kvlab.config import (
    Plan,
    add_config_dir,
    advice,
    complaint,
    conclude,
    conf_dir,
    explain,
    first_of_sweep,
    given,
    given_options,
    listing,
    make_plan,
    overrides_of,
    pages,
    parse_line,
    quote,
    sweep_of,
    task_of,
)
from kvlab.core import KvlabError, RunFailed
from kvlab.launch import done, in_turn, outcomes, same_run
from kvlab.track import FAILED, Owner, RunFolder, own

# Before torch is imported. Threads of OpenMP spin while they wait for one another: where other work
# shares the cores, many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
INTERRUPTED = 130
_TABLE_LINES = 40
_NARROWEST = 80  # columns of the table, also where the terminal is told to have fewer
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_SHOWS = ("help", "hydra_help", "cfg", "info", "shell_completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--version" in argv:
        print(f"kvlab {__version__}")
        return 0
    if not {"", os.getcwd()} & set(sys.path):  # `kvlab` finds classes of the user's own where
        sys.path.append(os.getcwd())           # `python -m kvlab` does
    debug = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:
        print("kvlab: interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in NO_ROOM or debug:
            raise
        print(f"kvlab: {error.strerror}: {error.filename or 'the run folder'}; what was measured "
              "is kept, and resume=true in the same folder goes on", file=sys.stderr)
        return 1
    except Exception as error:
        paragraph = None if debug else explain(error)
        if paragraph is None:
            raise
        print(f"kvlab: {paragraph}", file=sys.stderr)
        return 1 if isinstance(complaint(error), RunFailed) else 2


def _dispatch(argv: list[str]) -> int:
    """Check a run and own its folder before Hydra makes it; Hydra's own commands go to Hydra."""
    width, verb = get_terminal_size((120, 24)).columns, (argv or [""])[0]
    if verb in ("advise", "pages"):
        print(advice(argv[1:], width) if verb == "advise" else pages(argv[1:]))
        return 0
    args = parse_line(argv)
    if groups := _listed(args.overrides):
        print(listing(groups[1:], width))
        return 0
    if any(getattr(args, name) for name in _SHOWS):
        _hydra(lambda _config: None, argv, args)
        return 0
    plan = _check(args)
    key = "sweep" if args.multirun else "run"
    with plan.place.own(plan.settings.resume) as owner:
        # The clock has moved on since the check: the folder that was checked is to be made.
        fixed = f"hydra.{key}.dir={quote(str(owner.path))}"
        try:
            if args.multirun:
                return _sweep(owner, argv, args, fixed)
            return _single(plan, owner, argv, args, fixed)
        except KeyboardInterrupt:
            _say_how_to_go_on(argv, owner.path, fixed)
            return INTERRUPTED


def _say_how_to_go_on(argv: list[str], path: Path, fixed: str) -> None:
    """Where what was measured lies, and the command that goes on."""
    kept = [w for w in argv if not w.startswith(("hydra.run.dir=", "hydra.sweep.dir=", "resume="))]
    if re.fullmatch(r"/[\w./-]+", str(path)):  # nothing that Hydra would have to be quoted for
        fixed = f"{fixed.partition('=')[0]}={path}"
    print(f"kvlab: interrupted; every document that was finished is kept in {path}; go on with\n  "
          + shlex.join(["python", "-m", "kvlab", *kept, "resume=true", fixed]), file=sys.stderr)


def _listed(overrides: list[str]) -> list[str]:
    """`list` and the groups that are to be listed, which `GROUP=list` asks for, too."""
    groups = [o.removesuffix("=list") for o in overrides if o.endswith("=list")]
    return overrides if overrides[:1] == ["list"] else ["list", *groups] if groups else []


def _single(plan: Plan, owner: Owner, argv: list[str], args: Namespace, fixed: str) -> int:
    ended: list[int | KvlabError] = []

    def task(_config) -> None:
        try:
            ended.append(execute(plan, owner, HydraConfig.get().output_subdir))
        except KvlabError as error:  # Hydra would print a traceback of it
            ended.append(error)

    _hydra(task, argv, args, fixed)
    if isinstance(ended[0], KvlabError):
        raise ended[0]
    return ended[0]


def _sweep(owner: Owner, argv: list[str], args: Namespace, fixed: str) -> int:
    """Jobs by the launcher that was chosen, or here one after the other; the worst status."""
    try:
        _hydra(_one_of_sweep, argv, args, fixed)
    except KvlabError:
        if not outcomes(owner.path):
            owner.clear()
        raise
    return conclude(owner.path)


def _one_of_sweep(config) -> None:
    """A job that this process does itself; launchers of ours give its command line instead."""
    state = HydraConfig.get()
    folder = Path(state.sweep.subdir)
    task = task_of(state, config.resume, state.job.num, given(state, "task"), folder)
    same_run([task])
    if not done(task):
        in_turn(task, lambda: _job(state, Path(state.runtime.output_dir)))


def _job(state, path: Path) -> int:
    with own(path) as owner:
        owner.made = (path,)  # by Hydra, a moment ago
        try:
            plan = make_plan(overrides_of(state), state.job.config_name)
        except KvlabError:
            owner.clear((state.output_subdir or "",))
            raise
        return execute(plan, owner, state.output_subdir)


def _hydra(
    task: Callable[[object], None], argv: list[str], args: Namespace, *fixed: str
) -> None:
    """Run `task` as Hydra's; it sees the command line as it was typed, Hydra sees its own options
    first and `fixed` last."""

    def as_typed(config) -> None:
        with _command_line(argv):
            task(config)

    run = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    with _command_line([*given_options(args), *args.overrides, *fixed]):
        run(as_typed)()


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    """`words` as the arguments of this process, which libraries look at; exceptions get through."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [argv[0], *words], "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full


def _check(args: Namespace) -> Plan:
    """The plan of a single run, or of a sweep's first job."""
    given = first_of_sweep(args.overrides) if args.multirun else args.overrides
    overrides = add_config_dir(given, args.config_dir)
    folder = os.path.abspath(args.config_path or conf_dir())
    with hydra.initialize_config_dir(folder, job_name="kvlab", version_base="1.3"):
        return make_plan(overrides, args.config_name or "config",
                         "sweep" if args.multirun else "run", _started)


def _started(told: str) -> None:
    """The first line of a run, before the libraries that its job needs are loaded."""
    print(f"kvlab {__version__}: {told}; loading", flush=True)


def execute(plan: Plan, owner: Owner, also: str | None = None) -> int:
    """Run a checked plan in its folder, then print its table and write its report.

    A refusal that comes before the first number takes the folder away again, with `also`, what
    Hydra has put there. Returns 1 where variants failed.
    """
    seed_everything(plan.settings.seed)
    folder, held = None, 0
    try:
        folder = RunFolder(
            owner.path,
            config=yaml.safe_dump(plan.config, sort_keys=False, allow_unicode=True),
            resume=plan.settings.resume,
            tracker=plan.tracker,
            group=sweep_of(owner.path),
            job_type=plan.experiment,
            owner=owner,
        )
        with folder:
            held = len(folder.rows())
            _measure(plan, folder)
    except KvlabError:
        if folder is None or len(folder.rows()) == held:
            owner.clear((also or "",))
        raise
    return int(bool(folder.failures()))


def _measure(plan: Plan, folder: RunFolder) -> None:
    """The job and what is shown of it; what was measured before the run failed is shown too."""
    try:
        plan.job.run(folder, plan.variants)
    except RunFailed:
        _conclude(folder)
        raise
    _conclude(folder)


def _conclude(folder: RunFolder) -> None:
    if not folder.rows():
        return
    # what draws takes half of the time to start, so it is loaded when there is something to draw
    write_report, console_table = (axes.load("report", f"kvlab.report.{name}")
                                   for name in ("write_report", "console_table"))  # fmt: skip
    page = write_report([folder.path], folder.path / "report")
    folder.artifact(page.parent, "report")
    shown, settings = _first(folder.rows(), _TABLE_LINES)
    console = Console()
    console.print(console_table(shown, width=max(console.width, _NARROWEST)))
    if settings > _TABLE_LINES:
        print(f"... {settings - _TABLE_LINES} more in the report")
    print(f"\nresults in {folder.path}, report in {page.parent}")


def _first(rows: list[dict], lines: int) -> tuple[list[dict], int]:
    """The measurements of the first settings, one line of the table each, and what failed; how many
    settings there are."""
    keys = [(row["variant"], repr(sorted(row["params"].items()))) for row in rows]
    distinct = list(dict.fromkeys(keys))
    kept = set(distinct[:lines])
    shown = [row for key, row in zip(keys, rows) if key in kept or row["name"] == FAILED]
    return shown, len(distinct)


def seed_everything(seed: int) -> None:
    """Every generator that a job may draw from; torch only where a job has loaded it."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- libraries below still draw from the global generator
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


if __name__ == "__main__":
    sys.exit(main())
