"""Reading and writing trace files: plain, .xz or .gz, line by line, errors with line numbers."""

from __future__ import annotations

import gzip
import json
import lzma
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from kvlab.core import BadInput
from kvlab.sim.trace import MOONCAKE_BLOCK, Trace

BUNDLED = {name: f"mooncake_{name}.jsonl.xz" for name in ("conversation", "synthetic")}
ASSETS = Path(__file__).parent.parent / "assets" / "traces"
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


class Request(NamedTuple):
    """One line of a trace: arrival in ms, lengths in tokens, chained block ids of the input."""

    arrival_ms: float
    input_tokens: int
    output_tokens: int
    ids: list[int]


def load_trace(path: str | Path, block_size: int | None = None) -> Trace:
    """Read a whole trace file, or a bundled one ("conversation", "synthetic").

    `block_size` in tokens; None takes the file's header line, else Mooncake's 512. Raises
    `BadInput` naming file and line for anything that cannot be used.
    """
    columns = _Columns()
    stream = TraceStream(path, block_size)
    for request in stream.requests():
        columns.add(request)
    return columns.trace(stream.name, stream.block_size)


def load_traces(
    path: str | list[str], block_size: int | None = None, coarser: int = 1
) -> list[Trace]:
    """Traces of one path or several; `coarser` joins so many blocks into one, exactly."""
    paths = path if isinstance(path, list) else [path]
    traces = [load_trace(one, block_size) for one in paths]
    return [trace.coarser(coarser) for trace in traces] if coarser != 1 else traces


class TraceStream:
    """A trace file read piece by piece, so that its length does not matter for memory.

    Iterating opens the file anew. `pieces()` yields `Trace`s of about `piece` accesses.
    """

    def __init__(self, path: str | Path, block_size: int | None = None, piece: int = 1 << 20):
        self.path, self.piece = find(path), piece
        self.name = str(path) if str(path) in BUNDLED else self.path.name
        self._skip, self.block_size = _header(self.path, block_size)

    def requests(self) -> Iterator[Request]:
        for number, line in _lines(self.path):
            if number > self._skip and not line.isspace():
                yield _parse(f"{self.path}:{number}", line, self.block_size)

    def pieces(self) -> Iterator[Trace]:
        columns = _Columns()
        for request in self.requests():
            columns.add(request)
            if len(columns.ids) >= self.piece:
                yield columns.trace(self.name, self.block_size)
                columns = _Columns()
        if columns.lengths:
            yield columns.trace(self.name, self.block_size)


def write_trace(trace: Trace, path: str | Path) -> Path:
    """Write a trace in the format that `load_trace` reads; .xz and .gz compress."""
    path = Path(path)
    with _open(path, "wb") as out:
        if trace.block_size != MOONCAKE_BLOCK:
            out.write(json.dumps({"block_size": trace.block_size}).encode() + b"\n")
        columns = (trace.arrival_ms, trace.input_tokens, trace.output_tokens)
        for at, inputs, outputs, ids in zip(*(c.tolist() for c in columns), trace.requests()):
            at = int(at) if at == int(at) else at
            row = dict(zip(_FIELDS, (at, inputs, outputs, ids)))
            out.write(json.dumps(row).encode() + b"\n")
    return path


def find(path: str | Path) -> Path:
    """The file of a bundled name or of a path."""
    if str(path) in BUNDLED:
        return ASSETS / BUNDLED[str(path)]
    if not Path(path).is_file():
        known = ", ".join(BUNDLED)
        raise BadInput("trace.path", path, f"no such file; bundled traces: {known}")
    return Path(path)


class _Columns:
    """Requests packed into machine integers as they come: 8 bytes an access, not 100."""

    def __init__(self):
        self.arrival, self.ids = array("d"), array("q")
        self.inputs, self.outputs, self.lengths = array("q"), array("q"), array("q")

    def add(self, request: Request) -> None:
        self.arrival.append(request.arrival_ms)
        self.inputs.append(request.input_tokens)
        self.outputs.append(request.output_tokens)
        self.lengths.append(len(request.ids))
        self.ids.extend(request.ids)

    def trace(self, name: str, block_size: int) -> Trace:
        first = np.concatenate([[0], np.cumsum(np.asarray(self.lengths))]).astype(np.int64)
        columns = (self.arrival, self.inputs, self.outputs)
        return Trace(name, block_size, *map(np.asarray, columns), first, np.asarray(self.ids))


def _open(path: Path, mode: str) -> BinaryIO:
    return {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)(path, mode)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with _open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise BadInput("trace.path", f"{path}:{number + 1}", f"cannot be read: {error}") from None


def _header(path: Path, asked: int | None) -> tuple[int, int]:
    """(lines to skip, block size in tokens)."""
    _, line = next(_lines(path), (0, b""))
    try:
        row = json.loads(line)
    except ValueError:  # reported with everything else of that line when it is read
        row = None
    is_header = isinstance(row, dict) and "hash_ids" not in row and "block_size" in row
    said = row["block_size"] if is_header else None
    if said is not None and asked is not None and said != asked:
        raise BadInput("trace.block_size", asked, f"the header of {path} says {said}")
    size = asked if said is None else said
    size = MOONCAKE_BLOCK if size is None else size
    if not isinstance(size, int) or size < 1:
        where = f"{path}:1" if is_header else size
        raise BadInput("trace.block_size", where, "must be a whole number of tokens, at least 1")
    return int(is_header), size


def _parse(where: str, line: bytes, block_size: int) -> Request:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadInput("trace.path", where, f"not a line of JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadInput("trace.path", where, "expected a JSON object, one request a line")
    missing = [name for name in _FIELDS if name not in row]
    if missing:
        raise BadInput("trace.path", where, f"missing {', '.join(missing)}")
    request = Request(*(row[name] for name in _FIELDS))
    wrong = _fault(request, block_size)
    if wrong:
        raise BadInput("trace.path", where, wrong)
    return request


def _fault(request: Request, block_size: int) -> str | None:
    """What is wrong with the values of a request, as a sentence."""
    at, inputs, outputs, ids = request
    if type(at) not in (int, float) or not 0 <= at < float("inf"):
        return f"timestamp must be milliseconds of at least 0, not {at!r}"
    if type(inputs) is not int or inputs < 1:
        return f"input_length must be a whole number of at least 1, not {inputs!r}"
    if type(outputs) is not int or outputs < 0:
        return f"output_length must be a whole number of at least 0, not {outputs!r}"
    if type(ids) is not list or set(map(type, ids)) - {int}:
        return "hash_ids must be a list of whole numbers"
    if len(ids) != -(-inputs // block_size):
        return (
            f"{len(ids)} hash_ids, but {inputs} tokens in blocks of {block_size} are "
            f"{-(-inputs // block_size)}; is the block size of the trace another one?"
        )
    if not -(1 << 63) <= min(ids) <= max(ids) < 1 << 63:
        return "hash_ids must fit in 64 bits, signed"
    return None
