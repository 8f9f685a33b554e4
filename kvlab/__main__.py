"""`python -m kvlab [experiment=NAME] [group=option ...] [key=value ...]`: one run, start to end.

Exit status: 0 done, 2 bad input (one paragraph on stderr, nothing left behind), 130 interrupted.
Torch is imported by the jobs that compute with it, not here.
"""

from __future__ import annotations

import os
import random
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import hydra
import numpy as np
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from kvlab import __version__
from kvlab.config import Plan, add_config_dir, conf_dir, explain, first_of_sweep, make_plan, quote
from kvlab.config.place import Place
from kvlab.core import BadInput, KvlabError
from kvlab.report import console_table, write_report
from kvlab.track import RunFolder

_TABLE_LINES = 40
_SHOWS = ("help", "hydra_help", "cfg", "info", "shell_completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--version" in argv:
        print(f"kvlab {__version__}")
        return 0
    debug = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        with patch.dict(os.environ, HYDRA_FULL_ERROR="1"):  # Hydra then lets exceptions through
            _dispatch(argv)
    except KeyboardInterrupt:
        print("kvlab: interrupted; resume=true in the same folder goes on", file=sys.stderr)
        return 130
    except Exception as error:
        paragraph = None if debug else explain(error)
        if paragraph is None:
            raise
        print(f"kvlab: {paragraph}", file=sys.stderr)
        return 2
    return 0


def _dispatch(argv: list[str]) -> None:
    """Check a single run before Hydra makes its folder; Hydra's own commands go to Hydra."""
    args = _parse(argv)
    shows = any(getattr(args, name) for name in _SHOWS)
    plan = None if shows else _check(args)
    single = plan is not None and not args.multirun
    refusals: list[KvlabError] = []

    def task(_config) -> None:
        try:
            with patch.object(sys, "argv", typed):
                _run_job(plan if single else None)
        except KvlabError as error:
            if not single:
                raise  # Hydra names the job of the sweep
            refusals.append(error)

    run = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)
    typed = [sys.argv[0], *argv]
    # The clock has moved on since the check: the folder that was checked is the one to be made.
    fixed = [f"hydra.run.dir={quote(str(plan.place.path))}"] if single else []
    with patch.object(sys, "argv", [*typed, *fixed]):
        run()
    if refusals:
        raise refusals[0]


def _run_job(plan: Plan | None) -> None:
    """One job of Hydra's: the run whose plan was checked already, or one of a sweep."""
    state = HydraConfig.get()
    path = Path(state.runtime.output_dir)
    if plan is not None:
        return execute(plan, Place(path, plan.place.missing))
    place = Place(path, (path,))
    with place.restored_on_refusal():
        plan = make_plan(_task_overrides(state), state.job.config_name)
    return execute(plan, place, sweep=Path(state.sweep.dir).name)


def _parse(argv: list[str]) -> Namespace:
    parser = get_args_parser()

    def refuse(message: str):
        raise BadInput("command line", " ".join(argv), f"{message}; --help lists the options")

    parser.error = refuse
    return parser.parse_args(argv)


def _check(args: Namespace) -> Plan:
    """The plan of a single run, or of a sweep's first job."""
    given = first_of_sweep(args.overrides) if args.multirun else args.overrides
    overrides = add_config_dir(given, args.config_dir)
    folder = os.path.abspath(args.config_path or conf_dir())
    with hydra.initialize_config_dir(folder, job_name="kvlab", version_base="1.3"):
        return make_plan(overrides, args.config_name or "config")


def _task_overrides(state) -> list[str]:
    """A sweep's job was composed by Hydra; its variants need the user's search path again."""
    search = [o for o in state.overrides.hydra if o.startswith("hydra.searchpath=")]
    return [*search, *state.overrides.task]


def execute(plan: Plan, place: Place, sweep: str | None = None) -> None:
    """Run a checked plan in its folder, then print its table and write its report.

    A refusal that comes before the first number takes the folder away again.
    """
    seed_everything(plan.settings.seed)
    with ExitStack() as undo:
        undo.enter_context(place.restored_on_refusal())
        folder = undo.enter_context(
            RunFolder(
                place.path,
                config=yaml.safe_dump(plan.config, sort_keys=False, allow_unicode=True),
                resume=plan.settings.resume,
                tracker=plan.tracker,
                group=sweep,
                job_type=plan.experiment,
            )
        )
        held = len(folder.rows())
        try:
            plan.job.run(folder, plan.variants)
        except KvlabError:
            if len(folder.rows()) > held:
                undo.pop_all().close()  # numbers were measured: they stay
            raise
        _conclude(folder)


def _conclude(folder: RunFolder) -> None:
    if not folder.rows():
        return
    page = write_report([folder.path], folder.path / "report")
    folder.artifact(page.parent, "report")
    shown, settings = _first(folder.rows(), _TABLE_LINES)
    Console().print(console_table(shown))
    if settings > _TABLE_LINES:
        print(f"... {settings - _TABLE_LINES} more in the report")
    print(f"\nresults in {folder.path}, report in {page.parent}")


def _first(rows: list[dict], lines: int) -> tuple[list[dict], int]:
    """The measurements of the first settings, one line of the table each; how many there are."""
    keys = [(row["variant"], repr(sorted(row["params"].items()))) for row in rows]
    distinct = list(dict.fromkeys(keys))
    kept = set(distinct[:lines])
    return [row for key, row in zip(keys, rows) if key in kept], len(distinct)


def seed_everything(seed: int) -> None:
    """Every generator that a job may draw from; torch only where a job has loaded it."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- libraries below still draw from the global generator
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


if __name__ == "__main__":
    sys.exit(main())
