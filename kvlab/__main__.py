"""`python -m kvlab [experiment=NAME] [group=option ...] [key=value ...]`: one run, start to end.

Exit status: 0 done, 2 bad input (one paragraph on stderr, nothing written), 130 interrupted.
Torch is imported only by jobs that compute with it.
"""

from __future__ import annotations

import os
import random
import sys
from argparse import Namespace
from collections.abc import Sequence
from unittest.mock import patch

import hydra
import numpy as np
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig

from kvlab.config import Plan, add_config_dir, conf_dir, explain, make_plan
from kvlab.core import BadInput, KvlabError
from kvlab.report import console_table, write_report
from kvlab.track import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        with patch.dict(os.environ, HYDRA_FULL_ERROR="1"):  # Hydra then lets exceptions through
            _dispatch(argv)
    except KeyboardInterrupt:
        print("kvlab: interrupted; resume=true on the same folder goes on", file=sys.stderr)
        return 130
    except Exception as error:
        paragraph = None if debug else explain(error)
        if paragraph is None:
            raise
        print(f"kvlab: {paragraph}", file=sys.stderr)
        return 2
    return 0


def _dispatch(argv: list[str]) -> None:
    """Check a single run before Hydra makes its folder; leave everything else to Hydra."""
    args = _parse(argv)
    plan = None
    informs = args.help or args.hydra_help or args.version or args.cfg or args.info
    if not (informs or args.shell_completion or args.multirun):
        plan = _check(args)
    task = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(
        lambda _config: execute(plan or make_plan(HydraConfig.get().overrides.task))
    )
    with patch.object(sys, "argv", ["kvlab", *argv]):
        task()


def _parse(argv: list[str]) -> Namespace:
    parser = get_args_parser()

    def refuse(message: str):
        raise BadInput("command line", " ".join(argv), f"{message}; --help lists the options")

    parser.error = refuse
    return parser.parse_args(argv)


def _check(args: Namespace) -> Plan:
    overrides = add_config_dir(args.overrides, args.config_dir)
    folder = os.path.abspath(args.config_path or conf_dir())
    with hydra.initialize_config_dir(folder, job_name="kvlab", version_base="1.3"):
        return make_plan(overrides, args.config_name or "config")


def execute(plan: Plan) -> None:
    """Run a checked plan in its folder; a refusal before the first number leaves no folder."""
    _seed(plan.settings.seed)
    folder = RunFolder(plan.run_dir, resume=plan.settings.resume, tracker=plan.tracker)
    try:
        plan.job.run(folder, plan.variants)
    except KvlabError:
        if not folder.rows():
            folder.discard()
        raise
    console_table([plan.run_dir])
    write_report([plan.run_dir], plan.run_dir / "report")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- libraries below still draw from the global generator
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


if __name__ == "__main__":
    sys.exit(main())
