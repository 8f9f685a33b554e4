"""Committed results as one book: rows are looked up, and those that a page cites are numbered."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from kvlab.core import BadInput
from kvlab.report.names import interval, number
from kvlab.report.tables import Table
from kvlab.track import decode

ANCHOR = "rows-behind-the-table"
HEADING = "Rows behind the table"


class Book:
    """The results.jsonl of every report below a folder.

    folder: a folder of reports, each with results.jsonl. Raises BadInput where there is none, and
    later for a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.reports = sorted(p.parent.name for p in self.folder.glob("*/results.jsonl"))
        if not self.reports:
            raise BadInput("reports", folder, "holds no report with a results.jsonl")
        self.rows = cache(self._rows)
        self._cited: dict[tuple[str, int], tuple[int, dict]] = {}

    def _rows(self, report: str) -> list[dict]:
        """Rows of a report with the `line` of its file each stands in; [] of one that is not there
        or not of that kind."""
        file = self.folder / report / "results.jsonl"
        if report not in self.reports:
            return []
        return [decode(json.dumps(row), f"{file}:{line}") | {"line": line, "report": report}
                for line, row in objects(file, "name", "params")]

    def find(self, report: str, name: str, **wanted) -> list[dict]:
        """Rows of a measurement; `wanted` are settings, and `variant` or `value` of the row."""
        own = {k: wanted.pop(k) for k in ("variant", "value") if k in wanted}
        return [row for row in self.rows(report)
                if row["name"] == name and row.get("step") is None
                and all(row[k] == v for k, v in own.items())
                and all(row["params"].get(k) == v for k, v in wanted.items())]  # fmt: skip

    def devices(self, report: str) -> str:
        """What a report was measured on, `H200 and CPU`; "" where it does not say."""
        file = self.folder / report / "environments.json"
        runs = json.loads(file.read_text(encoding="utf-8")).values() if file.is_file() else ()
        told = [run.get("device") or {} for run in runs]
        names = ["CPU" if one.get("kind") == "cpu" else str(one.get("name", "")).removeprefix(
            "NVIDIA ") for one in told]
        return " and ".join(dict.fromkeys(filter(None, names)))

    def behind(self, name: str, variant: str, value: float) -> dict:
        """The row of any report that holds this very number. Raises BadInput where none does."""
        for report in self.reports:
            for row in self.find(report, name, variant=variant, value=value):
                return row
        raise BadInput("reports", self.folder,
                       f"no row says {name} of {variant} is {value}: rebuild the report")

    def cite(self, row: dict) -> str:
        """`[\\[3\\]](#rows-behind-the-table)`: the number under which `table` lists the row."""
        key = (row["report"], row["line"])
        number, _ = self._cited.setdefault(key, (len(self._cited) + 1, row))
        return rf"[\[{number}\]](#{ANCHOR})"

    def table(self) -> Table:
        """Every row that was cited, in order, with run, commit, interval and place."""
        rows = [row for _, row in self._cited.values()]
        table = Table(HEADING)
        table.column("no.", [str(i) for i, _ in self._cited.values()])
        table.column("measurement", [row["name"] for row in rows], numeric=False)
        table.column("variant", [row["variant"] for row in rows], numeric=False)
        table.column("value", [_value(row) for row in rows])
        table.column("run", [str(row["params"].get("run", "")) for row in rows], numeric=False)
        table.column("commit", [str(row["params"].get("commit", ""))[:12] for row in rows],
                     numeric=False)  # fmt: skip
        table.column("device", [str(row["params"].get("device", "")) for row in rows],
                     numeric=False)  # fmt: skip
        table.column("file and line", [f"{row['report']}/results.jsonl:{row['line']}"
                                       for row in rows], numeric=False)  # fmt: skip
        return table


def objects(file: Path, *keys: str) -> list[tuple[int, dict]]:
    """The JSON objects in the lines of `file` that have all `keys`, each with its line; others are
    rows of another kind. Raises BadInput naming a line that is no object, as a torn one is."""
    found = []
    for line, told in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(told) if told.strip() else {}
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise BadInput("line", f"{file}:{line}", "is no row in JSON; build the report anew")
        if all(key in row for key in keys):
            found.append((line, row))
    return found


def _value(row: dict) -> str:
    """With its interval; bytes to the last one."""
    if row["name"].endswith("_bytes"):
        return f"{row['value']:,.0f}"
    if row["low"] is None:
        return number(row["value"])
    return interval(row["value"], row["low"], row["high"])
