"""Which W&B run a run folder has, and what it is called."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

_ID = "kvlab-run-id"  # beside W&B's own files, which are no results
_OF_CLOCK = re.compile(r"[\d_.:-]+")  # how Hydra names folders, and a sweep its jobs


def run_id(folder: Path) -> str:
    """The id of the folder's W&B run: made once, so that a resumed run goes on with it."""
    file = folder / "wandb" / _ID
    if file.is_file() and (held := file.read_text(encoding="utf-8").strip()):
        return held
    file.parent.mkdir(parents=True, exist_ok=True)
    made = secrets.token_hex(6)
    file.write_text(made + "\n", encoding="utf-8")
    return made


def run_name(folder: Path, kind: str | None) -> str:
    """`hit_rate 2026-11-30 14-10-05`; the folder's own name where no clock or number gave it."""
    folder = folder.resolve()
    parts = [folder.name]
    if _OF_CLOCK.fullmatch(folder.name):
        parts.insert(0, folder.parent.name)
    return " ".join([*([kind] if kind else []), *parts])
