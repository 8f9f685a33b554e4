"""Running text to hide things in: RULER's essays from a file of the user's, or the bundled books.

RULER hides needles in essays of Paul Graham, which may not be passed on. With `eval.essays=PATH`
(the .json file that RULER's own script writes, a .txt file or a folder of them) a task is RULER's;
without, its haystack are the bundled books and its name ends in -books.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np

from kvlab.core import BadInput
from kvlab.eval.data import Books
from kvlab.eval.tasks.kept import digest_of

# in percent of sentences, half to even as numpy rounds
DEPTHS = tuple(int(x) for x in np.round(np.linspace(0, 100, num=40)))
_ENDS = re.compile(r"(?<=[.!?])[\"'\u201d\u2019)\]]*\s+(?=[\"'\u201c\u2018(\[]?[A-Z0-9])")


@lru_cache
def words(path: str | None) -> tuple[str, ...]:
    """All words of the essays, or of the books, in order. Raises `BadInput` for a bad path."""
    text = "\n".join(t for _, t in Books().texts()) if path is None else _essays(path)
    found = tuple(text.split())
    if not found:
        raise BadInput("eval.essays", path, "holds no words")
    return found


def _essays(given: str) -> str:
    path = Path(given).expanduser()
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        texts = [file.read_text("utf-8") for file in files]
        return json.loads(texts[0])["text"] if path.suffix == ".json" else "\n".join(texts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput("eval.essays", given, "must be a .txt file, a folder of them, or RULER's "
                       f"PaulGrahamEssays.json: {error!r}") from error


def origin(path: str | None) -> str:
    return "books" if path is None else digest_of(path)


def sentences(count: int, path: str | None) -> list[str]:
    """Of the first `count` words, which come again from the start where there are fewer."""
    there = words(path)
    taken = (there * (-(-count // len(there))))[:count]
    text, found, at = " ".join(taken), [], 0
    for end in _ENDS.finditer(text):
        closing = end.group().rstrip()
        found.append(text[at : end.start()] + closing)
        at = end.end()
    return [*found, text[at:]]


def hidden(needles: list[str], count: int, path: str | None, rng: Random) -> str:
    """The first `count` words with each needle behind a sentence, at depths that are drawn."""
    parts, text, last = [], sentences(count, path), 0
    places = sorted(len(text) * depth // 100 for depth in rng.sample(DEPTHS, len(needles)))
    for at, needle in zip(places, needles):
        parts += [" ".join(text[last:at]), needle]
        last = at
    return " ".join([*parts, " ".join(text[last:])])
