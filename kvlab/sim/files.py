"""Traces from files and to files: any known format, piece by piece, errors with their place."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvlab.core import BadInput
from kvlab.kinds import held
from kvlab.sim.readers import Row, fault, reader_of
from kvlab.sim.readers.lines import open_file
from kvlab.sim.readers.mooncake import FIELDS
from kvlab.sim.trace import MOONCAKE_BLOCK, Trace

BUNDLED = {name: f"mooncake_{name}.jsonl.xz" for name in ("conversation", "synthetic")}
ASSETS = Path(__file__).parent.parent / "assets" / "traces"


@held("trace")
def load_trace(
    path: str | Path,
    block_size: int | None = None,
    format: str | None = None,
    tokenizer: str | None = None,
) -> Trace:
    """Read a whole trace: a file or folder of a known format, or a bundled one ("conversation",
    "synthetic").

    `block_size` in tokens; None takes what the file says, else what its format has. `format`: one
    of `readers.NAMES`; None recognizes it. `tokenizer`: a tokenizer.json, for traces of text.
    Raises `BadInput` naming file and line for anything that cannot be used.
    """
    columns = _Columns()
    stream = TraceStream(path, block_size, format=format, tokenizer=tokenizer)
    for request in stream.requests():
        columns.add(request)
    return columns.trace(stream)


def load_traces(
    path: str | list[str],
    block_size: int | None = None,
    coarser: int = 1,
    format: str | None = None,
    tokenizer: str | None = None,
) -> list[Trace]:
    """Traces of one path or several; `coarser` joins so many blocks into one, exactly."""
    paths = path if isinstance(path, list) else [path]
    traces = [load_trace(one, block_size, format, tokenizer) for one in paths]
    return [trace.coarser(coarser) for trace in traces] if coarser != 1 else traces


class TraceStream:
    """A trace read piece by piece, so that its length does not matter for memory.

    Iterating opens the file anew. `pieces()` yields `Trace`s of about `piece` accesses. Formats
    whose requests have to be put in order (sessions in files of their own, dependencies) are held
    in memory once.
    """

    def __init__(
        self,
        path: str | Path,
        block_size: int | None = None,
        piece: int = 1 << 20,
        format: str | None = None,
        tokenizer: str | None = None,
    ):
        self.path, self.piece = find(path), piece
        self.name = str(path) if str(path) in BUNDLED else self.path.name
        self.reader = reader_of(self.path, format, block_size, tokenizer)
        self.block_size = self.reader.block_size

    def requests(self) -> Iterator[Row]:
        """Each request, checked; at least one."""
        reader, last = self.reader, 0.0
        where = None
        for where, row in self._rows():
            wrong = fault(row, self.block_size, reader.whole_blocks)
            if not wrong and row.arrival_ms < last:
                wrong = (
                    f"comes at {row.arrival_ms} ms, before the request ahead of it at {last} ms; "
                    "sort the trace by time"
                )
            if wrong:
                raise BadInput("trace.path", where, wrong)
            last = row.arrival_ms
            yield row
        if where is None:
            raise BadInput("trace.path", self.path, "no requests in it")

    def _rows(self) -> Iterator[tuple[str, Row]]:
        """What the reader reads; values of a kind that it did not expect are the file's fault."""
        where = self.path
        try:
            for where, row in self.reader.rows():
                yield where, row
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            remedy = f"at or behind it a value is not of the kind {self.reader.name} has ({said})"
            raise BadInput("trace.path", where, remedy) from error

    def pieces(self) -> Iterator[Trace]:
        columns = _Columns()
        for request in self.requests():
            columns.add(request)
            if len(columns.ids) >= self.piece:
                yield columns.trace(self)
                columns = _Columns()
        if columns.lengths:
            yield columns.trace(self)


def write_trace(trace: Trace, path: str | Path, plain: bool = False) -> Path:
    """Write a trace in Mooncake's form, which `load_trace` reads; .xz and .gz compress.

    A first line says block size and whether only whole blocks have ids, where either is not
    Mooncake's. plain: for other tools; no such line, and a partial block without an id gets one
    that nothing else has. Sessions and pauses are kept as `session_id` and `think_ms`.
    """
    trace.check_shares()
    path, trace = Path(path), _with_tails(trace) if plain else trace
    with open_file(path, "wb") as out:
        header = {} if plain else _header(trace)
        if header:
            out.write(json.dumps(header).encode() + b"\n")
        for row in _rows(trace):
            out.write(json.dumps(row).encode() + b"\n")
    return path


def _header(trace: Trace) -> dict:
    if trace.block_size == MOONCAKE_BLOCK and not trace.whole_blocks:
        return {}
    more = {"whole_blocks": True} if trace.whole_blocks else {}
    return {"block_size": trace.block_size, **more}


def _rows(trace: Trace) -> Iterator[dict]:
    columns = (trace.arrival_ms, trace.input_tokens, trace.output_tokens)
    session, think = (trace.columns.get(name) for name in ("session", "think_ms"))
    for i, (*values, ids) in enumerate(zip(*(c.tolist() for c in columns), trace.requests())):
        values[0] = int(values[0]) if values[0] == int(values[0]) else values[0]
        row = dict(zip(FIELDS, (*values, ids)))
        if session is not None and session[i] >= 0:
            row["session_id"] = int(session[i])
        if think is not None and think[i] == think[i]:
            row["think_ms"] = float(think[i])
        yield row


def _with_tails(trace: Trace) -> Trace:
    """Ids for the partial blocks that have none, each of them new."""
    if not trace.whole_blocks:
        return trace
    tails = trace.input_tokens % trace.block_size > 0
    fresh = int(trace.ids.max(initial=-1)) + 1 + np.arange(tails.sum())
    ids = np.insert(trace.ids, trace.first[1:][tails], fresh)
    first = trace.first + np.concatenate([[0], np.cumsum(tails)])
    return replace(trace, ids=ids, first=first, whole_blocks=False)


def find(path: str | Path) -> Path:
    """The file of a bundled name, or the file or folder of a path."""
    if str(path) in BUNDLED:
        return ASSETS / BUNDLED[str(path)]
    if not Path(path).exists():
        known = ", ".join(BUNDLED)
        raise BadInput("trace.path", path, f"no such file; bundled traces: {known}")
    return Path(path)


class _Columns:
    """Requests packed into machine integers as they come: 8 bytes an access, not 100."""

    def __init__(self):
        self.arrival, self.ids = array("d"), array("q")
        self.inputs, self.outputs, self.lengths = array("q"), array("q"), array("q")
        self.more = array("q"), array("d"), *(array("q") for _ in range(5))  # Row, from `session`

    def add(self, request: Row) -> None:
        at, inputs, outputs, ids, *more = request
        self.arrival.append(at)
        self.inputs.append(inputs)
        self.outputs.append(outputs)
        self.lengths.append(len(ids))
        for column, value in zip(self.more, more):
            column.append(value)
        if isinstance(ids, np.ndarray):
            self.ids.frombytes(ids.astype(np.int64).tobytes())
        else:
            self.ids.extend(ids)

    def trace(self, stream: TraceStream) -> Trace:
        first = np.concatenate([[0], np.cumsum(np.asarray(self.lengths))]).astype(np.int64)
        columns = (self.arrival, self.inputs, self.outputs)
        reader = stream.reader
        return Trace(
            stream.name, stream.block_size, *map(np.asarray, columns), first,
            np.asarray(self.ids), reader.whole_blocks, reader.shares, self._known(),
            reader.name, tuple(reader.notes),
        )  # fmt: skip

    def _known(self) -> dict[str, np.ndarray]:
        """What the file says beyond the necessary; a column that says nothing is left out."""
        columns = dict(zip(Row._fields[4:], map(np.asarray, self.more)))
        nothing = Row._field_defaults
        return {
            name: column for name, column in columns.items()
            if not np.array_equal(column, np.full(len(column), nothing[name]), equal_nan=True)
        }  # fmt: skip
