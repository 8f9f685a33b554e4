"""AXIS data: documents to measure on, read through `datasets`. Documents stay documents.

No window of tokens crosses from one document into the next: a cache that is measured across such
a seam is measured on text that nobody wrote.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from datasets import load_dataset

from kvlab import hub
from kvlab.core import BadInput

BOOKS = Path(__file__).resolve().parents[1] / "assets" / "books" / "heldout.jsonl.xz"
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Tokens whose spelling may change when the text goes on; they are cut off a partial text.
_MARGIN_TOKENS = 64
# Broken JSON, Parquet and encodings are ValueErrors of pyarrow; the hub's errors are OSErrors.
_READ_ERRORS = (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError)

datasets.logging.set_verbosity(logging.CRITICAL)  # what fails is said once, by BadInput
datasets.disable_progress_bars()


class Document(NamedTuple):
    """`ids`: the first tokens of one document, int32 [T]."""

    id: str
    ids: np.ndarray


class Source:
    """Documents from anywhere. A member yields `(id, text)`; this class turns text into tokens."""

    key = "data"        # the configuration key that chose this source, for messages

    def texts(self) -> Iterable[tuple[str, str]]:
        raise NotImplementedError

    def documents(self, tokenizer: Callable, count: int | None, tokens: int) -> list[Document]:
        """The first `tokens` tokens of the first `count` documents that are as long as that.

        count: null takes every document that is long enough. Raises `BadInput` where there are
        fewer than `count`, or none.
        """
        if tokens < 2:
            raise BadInput("eval.tokens", tokens, "must be at least 2 to predict anything")
        if count is not None and count < 1:
            raise BadInput("eval.documents", count, "must be at least 1, or null for all")
        found, longest, seen = [], 0, 0
        for name, text in self.texts():
            ids = first_tokens(tokenizer, text, tokens)
            seen, longest = seen + 1, max(longest, len(ids))
            if len(ids) == tokens:
                found.append(Document(name, ids))
            if len(found) == count:
                return found
        if not found or count is not None:
            raise BadInput(self.key, self, _too_short(count, tokens, seen, len(found), longest))
        return found

    def __str__(self) -> str:
        return type(self).__name__.lower()


def first_tokens(tokenizer: Callable, text: str, tokens: int) -> np.ndarray:
    """At most `tokens` ids of `text`, int32, without tokenizing the whole of a long book."""
    taken = 8 * (tokens + _MARGIN_TOKENS)
    while True:
        part = text[:taken]
        ids = tokenizer(part, verbose=False)["input_ids"]
        if len(part) == len(text) or len(ids) >= tokens + _MARGIN_TOKENS:
            return np.asarray(ids[:tokens], dtype=np.int32)
        taken *= 2


def _too_short(count: int | None, tokens: int, seen: int, found: int, longest: int) -> str:
    wanted = f"documents of {tokens} tokens wanted: {count or 'at least 1'}, long enough: {found}"
    there = f"of {seen} there" + (f", the longest has {longest} tokens" if not found else "")
    return f"{wanted} ({there}); lower eval.tokens or eval.documents, or give longer data"


class Books(Source):
    """The eight bundled held-out books, public domain; see `kvlab/assets/books`."""

    def texts(self) -> Iterator[tuple[str, str]]:
        return ((row["id"], row["text"]) for row in read_file(BOOKS, self.key))


class TextFile(Source):
    """A user's own text.

    path: a .txt file (one document), a folder of .txt files (one each), a .jsonl or .parquet file
    (one document a row). text_column: the column that holds the text of a row.
    A lone .txt file of which several documents are wanted is cut: its first tokens, those behind
    them and so on. That is said, since such documents are alike: intervals over them tell about
    this text.
    """

    key = "data.path"

    def __init__(self, path: str, text_column: str = "text"):
        self.path, self.text_column = path, text_column

    def texts(self) -> Iterator[tuple[str, str]]:
        path = Path(self.path).expanduser()
        if not path.exists():
            raise BadInput(self.key, path, "no such file or folder")
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise BadInput(self.key, path, "holds no .txt file")
        if files[0].suffix not in _READERS:
            raise BadInput(self.key, path, f"must end in one of {', '.join(_READERS)}")
        return self._rows(path) if files[0].suffix != ".txt" else self._whole(files)

    def documents(self, tokenizer: Callable, count: int | None, tokens: int) -> list[Document]:
        alone = Path(self.path).suffix == ".txt" and not Path(self.path).expanduser().is_dir()
        if not (alone and count and count > 1 and tokens > 1):
            return super().documents(tokenizer, count, tokens)
        [(name, text)] = self.texts()
        ids = first_tokens(tokenizer, text, count * tokens)
        pieces = [ids[at : at + tokens] for at in range(0, len(ids) - tokens + 1, tokens)]
        if len(pieces) < count:
            there = f"{len(ids)} tokens, enough for {len(pieces)} documents of {tokens}"
            raise BadInput(self.key, self, f"has {there}; eval.documents={count} were wanted: "
                           "lower it or eval.tokens, or give longer data")
        print(f"{name}: cut into {count} documents of {tokens} tokens, one behind the other; "
              "intervals over them tell about this text", file=sys.stderr, flush=True)
        return [Document(f"{name} {at}/{count}", piece) for at, piece in enumerate(pieces, 1)]

    def _whole(self, files: list[Path]) -> Iterator[tuple[str, str]]:
        for file in files:
            rows = read_file(file, self.key, sample_by="document")
            yield file.stem, "\n".join(row["text"] for row in rows)

    def _rows(self, file: Path) -> Iterator[tuple[str, str]]:
        for index, row in enumerate(read_file(file, self.key)):
            if self.text_column not in row:
                remedy = f"no such column in row {index}; known: {', '.join(row)}"
                raise BadInput("data.text_column", self.text_column, remedy)
            if not isinstance(row[self.text_column], str):
                raise BadInput("data.text_column", self.text_column, f"row {index} holds no text")
            yield str(row.get("id", index)), row[self.text_column]

    def __str__(self) -> str:
        return self.path


class HubText(Source):
    """Documents of a dataset on the Hugging Face hub: streamed, or from the local cache.

    name, config, split: as `datasets.load_dataset` takes them. text_column: holds the text.
    heading: null where a row is a document; else a regular expression for the line that opens a
    new document, in sets that store one line a row. rows: read at most.
    """

    key = "data.name"

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "test",
        text_column: str = "text",
        heading: str | None = None,
        rows: int = 1_000_000,
    ):
        self.name, self.config, self.split = name, config, split
        self.text_column, self.heading, self.rows = text_column, heading, rows

    def texts(self) -> Iterator[tuple[str, str]]:
        rows = islice(guarded(self._load(), self.key, self.name), self.rows)
        texts = (self._text(row) for row in rows)
        documents = texts if self.heading is None else join_lines(texts, self.heading)
        return ((f"{self.split}-{index}", text) for index, text in enumerate(documents))

    def _text(self, row: dict) -> str:
        if self.text_column not in row:
            remedy = f"no such column; known: {', '.join(row)}"
            raise BadInput("data.text_column", self.text_column, remedy)
        return row[self.text_column]

    def _load(self) -> Iterable[dict]:
        reason = hub.obstacle()
        try:
            if reason is None:
                return load_dataset(self.name, self.config, split=self.split, streaming=True)
            with offline():
                return load_dataset(self.name, self.config, split=self.split)
        except _READ_ERRORS as error:
            reason = reason or str(error).strip().partition("\n")[0]
        raise BadInput(
            self.key,
            self.name,
            f"not in the local cache, and {hub.endpoint()} gives nothing ({reason}); use the "
            "bundled data=books or your own text with data=text data.path=FILE",
        )

    def __str__(self) -> str:
        return self.name


@contextmanager
def offline() -> Iterator[None]:
    """`datasets` looks into its cache only, without retries; it reads its environment once."""
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def join_lines(lines: Iterable[str], heading: str) -> Iterator[str]:
    """Documents from a set that stores one line a row; a heading at level one opens the next."""
    opens, held = re.compile(heading), []
    for line in lines:
        if opens.search(line) and held:
            yield "".join(held)
            held = []
        held.append(line)
    if held:
        yield "".join(held)


def read_file(file: Path, key: str, **options) -> Iterator[dict]:
    """Rows of a local file, streamed. Raises `BadInput` under `key` where it cannot be read."""
    reader = _READERS[Path(file.name.removesuffix(".xz")).suffix]
    try:
        rows = load_dataset(reader, data_files=str(file), split="train", streaming=True, **options)
    except (*_READ_ERRORS, StopIteration) as error:
        reason = str(error).strip().partition("\n")[0] or "it is empty"
        raise BadInput(key, file, f"cannot be read: {reason}") from error
    return guarded(rows, key, file)


def guarded(rows: Iterable[dict], key: str, value: object) -> Iterator[dict]:
    """The rows; what breaks while they are read becomes a `BadInput`."""
    try:
        yield from rows
    except _READ_ERRORS as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(key, value, f"cannot be read: {reason}") from error
