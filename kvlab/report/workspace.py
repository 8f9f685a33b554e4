"""`python -m kvlab.report.workspace RUN... --entity E --project P`: a W&B workspace as code.

Panels of what the runs measured: the table of all rows, the frontier, heatmaps, quality, speed.
Saved with the user's own key (extra `workspace`); `--dry` prints the sections instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from importlib import import_module

from kvlab.core import BadInput, KvlabError
from kvlab.report.entries import entries
from kvlab.report.figures import drawings
from kvlab.report.source import Run, load
from kvlab.track import FAILED, summary_keys

_TABLE = "measurements"  # as the tracker logs all rows
_SPEED = ("/s", "ms", "s")  # units, or what they end with
_MOST_RUNS = 100  # in a panel
_MOST = 24  # variants in one panel; more cannot be told apart
_BYTES = ("bytes", "KiB", "MiB", "GiB")


class _Measured:
    """What runs hold, by the keys that it has in their summaries at W&B."""

    def __init__(self, runs: Iterable[Run]):
        self.units: dict[str, str] = {}
        self.better: dict[str, str | None] = {}
        self.of: dict[tuple[str, str], dict[str, None]] = {}  # (variant, setting) -> names
        for run in runs:
            rows = [r for r in run.rows if r["name"] != FAILED and r.get("step") is None]
            for variant, setting, row in summary_keys(rows):
                name = row["name"]
                self.units[name], self.better[name] = row["unit"], row["better"]
                self.of.setdefault((variant, setting), {})[name] = None

    def keys(self, *names: str) -> list[tuple[str, ...]]:
        """The keys of measurements that were made together, a variant and setting each."""
        return [
            tuple(f"{variant}/{name}{setting}.value" for name in names)
            for (variant, setting), held in self.of.items() if held.keys() >= set(names)
        ][:_MOST]  # fmt: skip

    def named(self, wanted: Callable[[str, str], bool]) -> list[str]:
        """Measurements by name and unit; facts, of which no direction is better, are left out."""
        return [n for n, unit in self.units.items() if self.better[n] and wanted(n, unit)]


def is_speed(name: str, unit: str) -> bool:
    return unit.endswith(_SPEED[0]) or unit in _SPEED


def is_bytes(name: str, unit: str) -> bool:
    return unit.startswith(_BYTES)


def workspace(
    runs: list, entity: str, project: str, name: str = "kvlab", group: str | None = None
):
    """A `wandb_workspaces` workspace of the runs' measurements, not saved.

    runs: paths as `python -m kvlab.report` takes them. group: shows the runs of one sweep only.
    Raises `BadInput` for paths without measurements, and where the extra is missing.
    """
    try:
        ws = import_module("wandb_workspaces.workspaces")
        wr = import_module("wandb_workspaces.reports.v2")
    except ImportError:
        remedy = "needs wandb-workspaces: pip install 'kvlab[workspace]'"
        raise BadInput("workspace", name, remedy) from None
    loaded = load(runs)
    measured = _Measured(loaded)
    figures = [f"figures/{drawing.stem}" for drawing in drawings(entries(loaded), loaded)]
    told = {
        "Decision table": _table(wr),
        "Frontier": _frontier(wr, measured, figures),
        "Heatmaps": _media(wr, [f for f in figures if "heatmap" in f]),
        "Quality": _bars(wr, measured, lambda n, u: not is_speed(n, u) and not is_bytes(n, u)),
        "Speed": _bars(wr, measured, is_speed),
        "Bytes": _bars(wr, measured, is_bytes),
    }
    sections = [
        ws.Section(name=title, panels=panels, is_open=title in ("Decision table", "Frontier"))
        for title, panels in told.items() if panels
    ]  # fmt: skip
    more = {"settings": ws.WorkspaceSettings(max_runs=_MOST_RUNS)}
    if group:
        more["runset_settings"] = ws.RunsetSettings(filters=ws.And(ws.Metric("Group") == group))
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, **more)


def _table(wr) -> list:
    """All rows with their intervals, and in what the runs' settings differ."""
    return [wr.WeavePanelSummaryTable(table_name=_TABLE), wr.RunComparer(diff_only="split")]


def _frontier(wr, measured: _Measured, figures: list[str]) -> list:
    """The figure that the report draws, and of each variant a point for each run."""
    panels = _media(wr, [f for f in figures if "vs_bytes" in f or "frontier" in f])
    size = next(iter(measured.named(is_bytes)), None)
    loss = next(iter(measured.named(lambda name, unit: unit in ("nats", "%"))), None)
    for keys in measured.keys(size, loss) if size and loss else ():
        x, y = map(wr.SummaryMetric, keys)
        panels.append(wr.ScatterPlot(title=keys[1].removesuffix(".value"), x=x, y=y))
    return panels


def _media(wr, keys: list[str]) -> list:
    return [wr.MediaBrowser(media_keys=[key]) for key in keys]


def _bars(wr, measured: _Measured, wanted: Callable[[str, str], bool]) -> list:
    return [
        wr.BarPlot(
            title=f"{_titled(name, measured.units[name])}: {measured.better[name]} is better",
            metrics=[wr.SummaryMetric(key) for [key] in measured.keys(name)],
        )
        for name in measured.named(wanted)
    ]


def _titled(name: str, unit: str) -> str:
    return f"{name.replace('_', ' ')}, {unit}" if unit else name.replace("_", " ")


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 2 with one sentence on stderr where there is nothing to show or no key."""
    parser = argparse.ArgumentParser(prog="python -m kvlab.report.workspace", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, sweep or report")
    parser.add_argument("--entity", required=True, help="user or team at W&B")
    parser.add_argument("--project", default="kvlab")
    parser.add_argument("--name", default="kvlab", help="of the view")
    parser.add_argument("--group", help="show the runs of this sweep only")
    parser.add_argument("--dry", action="store_true", help="print the sections, save nothing")
    told = parser.parse_args(arguments)
    try:
        made = workspace(told.runs, told.entity, told.project, told.name, told.group)
        if told.dry:
            for section in made.sections:
                print(f"{section.name}: {len(section.panels)} panels")
        else:
            print(_save(made).url)
    except KvlabError as error:
        print(f"kvlab.report.workspace: {error}", file=sys.stderr)
        return 2
    return 0


def _save(made):
    try:
        return made.save()
    except Exception as error:  # no key, no network, no such project
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise BadInput("workspace", made.name, f"cannot be saved: {said}") from error


if __name__ == "__main__":
    sys.exit(main())
