"""Readers of request traces, one file a format; `reader_of` finds the one for a file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from kvlab.core import BadInput
from kvlab.sim.readers.azure import Azure
from kvlab.sim.readers.bailian import Bailian
from kvlab.sim.readers.base import Head, Reader, Row, fault
from kvlab.sim.readers.baseten import Baseten
from kvlab.sim.readers.burstgpt import BurstGPT
from kvlab.sim.readers.delta import MooncakeDelta
from kvlab.sim.readers.dynamo import AgenticMooncake
from kvlab.sim.readers.lines import lines, whole_json
from kvlab.sim.readers.lmcache import LMCache
from kvlab.sim.readers.mooncake import Mooncake
from kvlab.sim.readers.sharegpt import ShareGPT
from kvlab.sim.readers.text import parquet_fields
from kvlab.sim.readers.tracelab import TraceLab
from kvlab.sim.readers.trie import AppliedCompute
from kvlab.sim.readers.weka import Weka, session_files

READERS: tuple[type[Reader], ...] = (
    Mooncake, MooncakeDelta, AgenticMooncake, AppliedCompute, Bailian, Weka, TraceLab, LMCache,
    ShareGPT, Baseten, Azure, BurstGPT,
)  # fmt: skip
NAMES = tuple(reader.name for reader in READERS)

__all__ = ["NAMES", "READERS", "Reader", "Row", "fault", "reader_of"]


def reader_of(
    path: Path,
    format: str | None = None,
    block_size: int | None = None,
    tokenizer: str | None = None,
) -> Reader:
    """The reader of a file or folder: the one named, or the one whose fields its head has."""
    return _class_of(path, format)(path, block_size, tokenizer)


def _class_of(path: Path, format: str | None) -> type[Reader]:
    if format is not None:
        if format not in NAMES:
            raise BadInput("trace.format", format, f"known: {', '.join(NAMES)}")
        return READERS[NAMES.index(format)]
    head = head_of(path)
    found = next((reader for reader in READERS if reader.claims(head)), None)
    if found is None:
        fields = ", ".join(sorted(head.fields)[:8]) or "none"
        remedy = f"no format known by these fields: {fields}; name one of trace.format={NAMES}"
        raise BadInput("trace.path", path, remedy)
    return found


def head_of(path: Path) -> Head:
    """Kind and fields of what lies there; reads no more than it has to."""
    if path.is_dir():
        if sorted(path.glob("*.parquet")):
            return Head(path, "parquet", parquet_fields(path))
        files = session_files(path)
        if not files:
            remedy = "a folder of neither Parquet files nor JSON sessions"
            raise BadInput("trace.path", path, remedy)
        return Head(path, "folder", _json_fields(files[0]))
    if path.suffix == ".parquet":
        return Head(path, "parquet", parquet_fields(path))
    where, line = next(lines(path), (None, b""))
    if where is None:
        raise BadInput("trace.path", path, "no requests in it")
    text = line.decode("utf-8-sig", errors="replace").strip()
    if text[:1] not in ("{", "[") and "," in text:
        return Head(path, "csv", frozenset(next(csv.reader([text]))))
    return Head(path, "json", _json_fields(path))


def _json_fields(path: Path) -> frozenset[str]:
    """Fields of the first object: of the first line, or of a file that is one JSON value."""
    _, line = next(lines(path), ("", b""))
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        spread = line.strip() in (b"{", b"[") or line.lstrip().startswith(b"[")
        value = whole_json(path) if spread else {}
    value = value[0] if isinstance(value, list) and value else value
    return frozenset(value) if isinstance(value, dict) else frozenset()
