"""`python -m kvlab.track.group ENTITY/PROJECT/GROUP --out FOLDER`: a sweep read back from W&B.

The folder is as the sweep's own: a folder for each run, with configuration, environment and rows.
`python -m kvlab.report FOLDER` makes one report of it.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import import_module
from pathlib import Path

from kvlab.core import BadInput, KvlabError


def fetch(address: str, out: Path) -> list[Path]:
    """Download the results of a group's runs into `out`, the oldest first; their folders.

    address: `ENTITY/PROJECT/GROUP`, or `PROJECT/GROUP` of the one who is logged in. Of a run that
    was resumed the last results count. Raises `BadInput` where W&B cannot be read or has none.
    """
    project, _, group = address.rpartition("/")
    if not project or not group:
        raise BadInput("group", address, "is ENTITY/PROJECT/GROUP; a sweep's folder is its group")
    if out.exists() and any(out.iterdir()):
        raise BadInput("out", out, "is not empty; choose another folder")
    try:
        api = import_module("wandb").Api()
        runs = list(api.runs(project, filters={"group": group}, order="+created_at"))
        folders = [_download(run, out / _file_name(run, number)) for number, run in enumerate(runs)]
    except Exception as error:  # the library's many: no key, no network, no such project
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise BadInput("group", address, f"cannot be read from W&B: {said}") from error
    if found := [folder for folder in folders if folder]:
        return found
    remedy = f"no results of {len(runs)} runs; `wandb sync` those that are offline"
    raise BadInput("group", address, remedy)


def _download(run, folder: Path) -> Path | None:
    results = [artifact for artifact in run.logged_artifacts() if artifact.type == "results"]
    if not results:
        return None
    results[-1].download(root=str(folder))
    return folder


def _file_name(run, number: int) -> str:
    """The job's number in its sweep where the run's name ends with one, else a number of ours."""
    match = re.search(r"(?<=\s)\d+$", run.name or "")
    return match[0] if match else f"{number}-{run.id}"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 2 with one sentence on stderr for a group that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m kvlab.track.group", description=__doc__)
    parser.add_argument("group", metavar="ENTITY/PROJECT/GROUP")
    parser.add_argument("--out", required=True, help="an empty folder, or one to be made")
    told = parser.parse_args(arguments)
    try:
        folders = fetch(told.group, Path(told.out))
    except KvlabError as error:
        print(f"kvlab.track.group: {error}", file=sys.stderr)
        return 2
    print(f"{len(folders)} runs in {told.out}; python -m kvlab.report {told.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
