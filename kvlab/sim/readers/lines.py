"""Files of lines, plain, .xz or .gz, with the place of every complaint."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from kvlab.core import BadInput

_POINTER = b"version https://git-lfs"


def open_file(path: Path, mode: str = "rb") -> BinaryIO:
    return {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)(path, mode)


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(place as "file:number", line) of each line that is not blank."""
    number = 0
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(_POINTER):
                    remedy = "a Git LFS pointer, not the trace; git lfs pull fetches the file"
                    raise BadInput("trace.path", path, remedy)
                if not line.isspace():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise BadInput("trace.path", f"{path}:{number + 1}", f"cannot be read: {error}") from None


def parse(where: str, line: bytes) -> dict:
    """One line as a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            remedy = "the last line is cut off, so the file is not whole; fetch it again"
            raise BadInput("trace.path", where, remedy) from None
        raise BadInput("trace.path", where, f"not a line of JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadInput("trace.path", where, "expected a JSON object, one request a line")
    return row


def whole_json(path: Path) -> object:
    """A file that is one JSON value."""
    text = b"".join(line for _, line in lines(path))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # nested without end
        raise BadInput("trace.path", path, f"not a whole JSON file: {error}") from None


def table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, cells by the names of the first line) of each line of a CSV file."""
    rows = ((where, line.decode("utf-8-sig").strip()) for where, line in lines(path))
    _, head = next(rows, (None, ""))
    names = next(csv.reader([head]), [])
    for where, line in rows:
        cells = next(csv.reader([line]))
        if len(cells) != len(names):
            remedy = f"{len(cells)} cells under {len(names)} names; is the line cut off?"
            raise BadInput("trace.path", where, remedy)
        yield where, dict(zip(names, cells))


def number(where: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadInput("trace.path", where, f"{name} must be a number, not {text!r}") from None


def count(where: str, name: str, text: str) -> int:
    """A whole number of a table; 12.0 is one."""
    value = number(where, name, text)
    if value != int(value):
        raise BadInput("trace.path", where, f"{name} must be a whole number, not {text!r}")
    return int(value)


def milliseconds(where: str, name: str, text: object) -> float:
    """Unix time in ms of an ISO 8601 text; without a zone it is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except (ValueError, TypeError):
        raise BadInput("trace.path", where, f"{name} must be a date, not {text!r}") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return 1e3 * moment.timestamp()
