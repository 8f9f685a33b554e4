"""What W&B is shown of rows and files: keys, intervals, cells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvlab.track.rows import canonical, plain


def by_step(rows: list[dict]) -> dict:
    batches: dict = {}
    for row in rows:
        batches.setdefault(row.get("step"), []).append(row)
    return batches


def key_of(row: dict) -> str:
    return f"{row['variant']}/{row['name']}"


def interval(row: dict) -> dict:
    return plain({end: row[end] for end in ("value", "low", "high")})


def settings(row: dict, rows: list[dict]) -> str:
    """`[tokens=1000]` where the rows differ in tokens; empty where one setting was measured."""
    differ = [
        f"{key}={row['params'][key]}"
        for key in sorted(row["params"])
        if any(other["params"].get(key) != row["params"][key] for other in rows)
    ]
    return f"[{' '.join(differ)}]" if differ else ""


def summary_keys(rows: list[dict]) -> Iterator[tuple[str, str, dict]]:
    """(variant, what follows its measurements' names in the summary, row): nothing where one
    setting was measured, else in brackets the settings that differ."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(key_of(row), []).append(row)
    for group in groups.values():
        several = len({canonical(row["params"]) for row in group}) > 1
        for row in group:
            yield row["variant"], settings(row, group) if several else "", row


def scalar(value) -> bool:
    return isinstance(value, (int, float, str, bool))


def cell(value):
    return value if scalar(value) or value is None else str(value)


def own_files(folder: Path) -> list[Path]:
    """Files of a run folder or report; neither W&B's own nor Hydra's nor logs nor scores."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".log"]
    return [
        p
        for p in files
        if not any(x in ("wandb", "scores") or x[0] == "." for x in p.relative_to(folder).parts)
    ]
