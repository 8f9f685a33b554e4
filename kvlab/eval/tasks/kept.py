"""Items in the user's cache folder: drawn once for a task, its settings, a tokenizer and a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvlab import hub
from kvlab.eval.task import Item, Question
from kvlab.track import canonical, save_whole

VERSION = 1  # goes up when a generator draws other items


class Kept:
    """One file for each part of a task; one that cannot be read or written is drawn anew."""

    def __init__(self, task, tokenizer, seed: int):
        about = {
            "task": task.params(), "class": type(task).__qualname__, "seed": seed,
            "version": VERSION, "tokenizer": fingerprint(tokenizer), "data": task.read_from(),
        }
        digest = hashlib.sha256(canonical(about).encode()).hexdigest()[:16]
        self.file = hub.cache_folder() / "items" / f"{task.name}-{task.length}-{digest}.npz"

    def items(self, draw: Callable[[], list[Item]]) -> list[Item]:
        held = self._read()
        if held is None:
            held = draw()
            self._write(held)
        return held

    def _read(self) -> list[Item] | None:
        try:
            with np.load(self.file) as found:
                ids, about = found["ids"], json.loads(str(found["about"]))
            ends = iter(np.split(ids, np.cumsum(about["lengths"])[:-1]))
            return [self._item(told, ends) for told in about["items"]]
        except Exception:  # missing, or broken in any way that numpy, zipfile and json know
            return None

    def _item(self, told: dict, ids) -> Item:
        context, blank = next(ids), next(ids)
        questions = tuple(
            Question(next(ids), texts=tuple(q["texts"]), tags=q["tags"], inside=q["inside"])
            for q in told["questions"]
        )
        return Item(told["name"], context, questions, blank=blank)

    def _write(self, items: list[Item]) -> None:
        parts = [part for item in items
                 for part in (item.context, item.blank, *(q.ids for q in item.questions))]
        about = {
            "lengths": list(map(len, parts)),
            "items": [{"name": item.name, "questions": [
                {"texts": q.texts, "tags": dict(q.tags), "inside": q.inside}
                for q in item.questions]} for item in items],
        }  # fmt: skip
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_whole(self.file, {
                "ids": np.concatenate(parts).astype(np.int64), "about": np.str_(json.dumps(about)),
            })
        except OSError:
            pass  # a cache that cannot be written costs time only


def fingerprint(tokenizer) -> str:
    """What a tokenizer makes of text, in a word: its file, and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab()))
    return digest(told + str(getattr(tokenizer, "chat_template", "")))


def digest(text: str | bytes) -> str:
    data = text if isinstance(text, bytes) else text.encode()
    return hashlib.sha256(data).hexdigest()[:16]


def digest_of(path: str | Path) -> str:
    """Of a file that a task reads, or of all .txt files of a folder."""
    path = Path(path).expanduser()
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    return digest(b"".join(file.read_bytes() for file in files))
