"""Reads a run-*.wandb file as W&B's offline mode leaves it; for tests only.

The framing is LevelDB's log format (32 KiB blocks, records with CRC, length and kind), the records
are the library's protobuf messages.
"""

import json
import struct
import time
import zlib
from pathlib import Path

import pytest

BLOCK, HEAD = 32768, 7
FULL, FIRST, LAST = 1, 2, 4


def _messages():
    """The library's records; a test that reads some is skipped where it is not installed."""
    return pytest.importorskip("wandb.proto.wandb_internal_pb2")


def records(path):
    data, position, buffer = Path(path).read_bytes(), 7, b""
    while position + HEAD <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEAD:
            position += left
            continue
        crc, size, kind = struct.unpack("<IHB", data[position : position + HEAD])
        body = data[position + HEAD : position + HEAD + size]
        if len(body) < size:
            return
        assert zlib.crc32(body, zlib.crc32(bytes([kind]))) & 0xFFFFFFFF == crc
        position += HEAD + size
        buffer = body if kind in (FULL, FIRST) else buffer + body
        if kind in (FULL, LAST):
            record = _messages().Record()
            record.ParseFromString(buffer)
            yield record


def items(sequence):
    return {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in sequence}


def load(folder):
    """config, history, summary, metrics, artifacts, and what the run is called, of a run folder."""
    (path,) = Path(folder).glob("wandb/*run-*/run-*.wandb")
    run = {"config": {}, "history": [], "summary": {}, "metrics": {}, "artifacts": {}, "exit": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            told = record.run
            run["meta"] = (told.project, told.run_group, told.job_type, list(told.tags))
            run["config"].update(items(told.config.update))
        elif kind == "config":
            run["config"].update(items(record.config.update))
        elif kind == "history":
            run["history"].append(items(record.history.item))
        elif kind == "summary":
            run["summary"].update(items(record.summary.update))
            for gone in record.summary.remove:
                run["summary"].pop(".".join(gone.nested_key) or gone.key, None)
        elif kind == "metric":
            name = record.metric.name or record.metric.glob_name
            run["metrics"][name] = record.metric.step_metric
        elif kind == "artifact":
            files = [entry.path for entry in record.artifact.manifest.contents]
            run["artifacts"][record.artifact.type] = files
        elif kind == "exit":
            run["exit"] = record.exit.exit_code
    return run


def load_finished(folder, seconds=10):
    """The same, once the end of the run is in the file: W&B's process writes it in its own time."""
    until = time.monotonic() + seconds
    while (run := load(folder))["exit"] is None and time.monotonic() < until:
        time.sleep(0.05)
    return run
