"""Scores on disk: what a runner measured on an item, so that a killed run goes on behind it."""

from __future__ import annotations

import hashlib
import re
import zlib
from pathlib import Path

import numpy as np

from kvlab.cache import CacheStats
from kvlab.core import BadInput
from kvlab.eval.runner import Runner
from kvlab.track import canonical, save_whole

FOLDER = "scores"
ACCOUNT = ("stats", "peak_bytes", "tokens")  # beside the arrays of a task


class Scores:
    """One file for each runner and item in the run folder, written whole or not at all.

    It holds the arrays of `runner.raws`, the cache's account and its peak. A file is of the tokens
    that it was measured on: for others it does not count.
    """

    def __init__(self, folder):
        self.path = Path(folder.path) / FOLDER

    def take(self, runner: Runner, number: int, ids: np.ndarray) -> bool:
        """Give `runner` what is on disk of item `number`, of tokens `ids`; whether there is any."""
        held = self._read(self._file(runner, number), fingerprint(ids))
        if held is None:
            return False
        runner.raws[number] = {k: v for k, v in held.items() if k not in ACCOUNT}
        runner.stats += [CacheStats(*row) for row in held["stats"].tolist()]
        runner.peak_bytes = max(runner.peak_bytes, int(held["peak_bytes"]))
        return True

    def keep(self, runner: Runner, number: int, ids: np.ndarray, accounts: int = 1) -> None:
        """Write what the runner has of the item, and the last `accounts` of the cache."""
        if taken := [name for name in ACCOUNT if name in runner.raws[number]]:
            raise BadInput("task", taken[0], f"names an array that is kept beside {ACCOUNT}")
        save_whole(self._file(runner, number), {
            **runner.raws[number], "stats": np.array(runner.stats[-accounts:], dtype=np.float64),
            "peak_bytes": np.int64(runner.peak_bytes), "tokens": np.int64(fingerprint(ids)),
        })

    def _file(self, runner: Runner, number: int) -> Path:
        about = f"{runner.name} {canonical(runner.params)}"
        slug = re.sub(r"[^A-Za-z0-9]+", "-", runner.name)[:40].strip("-")
        code = hashlib.sha256(about.encode()).hexdigest()[:12]
        return self.path / f"{slug}-{code}-{number + 1:04d}.npz"

    def _read(self, file: Path, tokens: int) -> dict[str, np.ndarray] | None:
        try:
            with np.load(file) as found:
                held = {key: found[key] for key in found.files}
            whole = held["stats"].shape[1] == len(CacheStats._fields) and "peak_bytes" in held
        except Exception:  # missing, or broken in any way that numpy, zipfile and zlib know
            return None
        return held if whole and held.get("tokens") == tokens else None


def fingerprint(ids: np.ndarray) -> int:
    """Of token ids, whatever holds them."""
    return zlib.crc32(np.asarray(ids, dtype=np.int64).tobytes())
