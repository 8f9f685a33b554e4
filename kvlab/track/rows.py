"""The line format of measurements.jsonl and results.jsonl: one measurement, one JSON object.

A line is `{"variant", "params", "name", "value", "unit", "better", "low", "high", "count"}`, with
`step` when there is one (the number of a document). A variant that raised has a row named `failed`
with its `reason` and what is `missing` for it; it stands until that was measured.

JSON has no NaN or infinity, so a number that is not finite is written as the string
"NaN", "Infinity" or "-Infinity": `float(row["value"])` works on every line, and null
keeps its one meaning, "there is no interval". `read_rows` gives floats back.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from kvlab.core import BadInput, Measurement

NUMBERS = ("value", "low", "high")
FAILED = "failed"


def plain(thing):
    """What JSON can hold for `thing`: numpy and torch values, tuples and paths included."""
    if isinstance(thing, dict):
        return {str(key): plain(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple, set, frozenset)):
        return [plain(value) for value in thing]
    if hasattr(thing, "tolist"):
        return plain(thing.tolist())
    if isinstance(thing, float) and not math.isfinite(thing):
        return "NaN" if math.isnan(thing) else "Infinity" if thing > 0 else "-Infinity"
    return thing if isinstance(thing, (str, int, float, bool, type(None))) else str(thing)


def to_row(variant: str, params: dict, measurement: Measurement, step: int | None = None) -> dict:
    """The row of one measurement, its numbers still floats. Raises TypeError without a value."""
    row = {"variant": variant, "params": plain(params), **measurement._asdict()}
    row.update({key: None if row[key] is None else float(row[key]) for key in NUMBERS})
    row["value"] = float(measurement.value)
    row["count"] = None if measurement.count is None else int(measurement.count)
    return row if step is None else {**row, "step": int(step)}


def failed_row(variant: str, params: dict, reason: str, missing: str | None = None) -> dict:
    """`missing`: the measurement that a success would have; None: any."""
    row = to_row(variant, params, Measurement(FAILED, 1.0, "", "lower"))
    return {**row, "reason": reason, "missing": missing}


def standing(rows: list[dict]) -> list[dict]:
    """The rows without failures that a later success has made good."""
    measured: dict[tuple, set[str]] = {}
    for row in rows:
        if row["name"] != FAILED and row.get("step") is None:
            measured.setdefault(identity(row)[:2], set()).add(row["name"])

    def stands(row: dict) -> bool:
        there = measured.get(identity(row)[:2], set())
        missing = row.get("missing")
        return row["name"] != FAILED or (missing not in there if missing else not there)

    return [row for row in rows if stands(row)]


def encode(row: dict) -> str:
    """One line without its newline; strict JSON whatever the numbers are."""
    return json.dumps(plain(row), allow_nan=False, ensure_ascii=False)


def identity(row: dict) -> tuple:
    """What makes two rows the same measurement: everything but the result."""
    return (row["variant"], canonical(row["params"]), row["name"], row.get("step"))


def canonical(params: dict) -> str:
    return json.dumps(plain(params), sort_keys=True)


def decode(text: str, where: str) -> dict:
    """The row of one line. Raises BadInput naming the file and line where it is none."""
    try:
        row = json.loads(text)
        row.update({key: None if row.get(key) is None else float(row[key]) for key in NUMBERS})
    except (ValueError, TypeError, AttributeError):
        raise BadInput("line", where, "is no measurement in JSON; remove it or run again") from None
    if not (isinstance(row.get("variant"), str) and isinstance(row.get("name"), str)):
        raise BadInput("line", where, "has no variant and name; it is no measurement")
    if row["value"] is None or not isinstance(row.setdefault("params", {}), dict):
        raise BadInput("line", where, "needs a value and params that are an object")
    for key, value in (("unit", ""), ("better", None), ("count", None)):
        row.setdefault(key, value)  # what is there keeps its order: rows may be written again
    return row


def read_rows(path: Path) -> tuple[list[dict], int]:
    """All rows of a file, and how many of its bytes are whole lines.

    A last line without its newline that cannot be read was torn by a killed run: it is left out of
    both. A broken line anywhere else is damage, and raises BadInput.
    """
    *whole, tail = Path(path).read_bytes().split(b"\n")
    lines = [(number, line) for number, line in enumerate(whole, 1) if line.strip()]
    rows = [decode(text(line), f"{path}:{number}") for number, line in lines]
    size = sum(len(line) + 1 for line in whole)
    try:
        if tail.strip():
            rows.append(decode(text(tail), "tail"))
            size += len(tail)
    except BadInput:
        pass
    return rows, size


def read_objects(path: Path) -> list[dict]:
    """The JSON objects of a file, one a line; one that a kill tore off at the end is left out.
    Raises BadInput naming file and line for any other that is none."""
    *whole, tail = Path(path).read_bytes().split(b"\n")
    found = [_object(line, f"{path}:{n}") for n, line in enumerate(whole, 1) if line.strip()]
    try:
        return [*found, _object(tail, "tail")]
    except BadInput:
        return found


def _object(line: bytes, where: str) -> dict:
    try:
        row = json.loads(text(line))
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise BadInput("line", where, "is no JSON object; remove it or measure again")
    return row


def torn_batch(rows: list[dict], tail: bytes) -> tuple | None:
    """Variant and params of the last rows where `tail`, what a kill left of a line, goes on with
    them: their batch is not whole. None where it begins another, or is empty."""
    if not rows or not tail:
        return None
    head, torn = encode(rows[-1]).partition('"name": ')[0], text(tail)
    return identity(rows[-1])[:2] if torn.startswith(head) or head.startswith(torn) else None


def text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")
