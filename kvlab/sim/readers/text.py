"""Traces of text: messages are tokenized, cut into whole blocks, and blocks named by content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvlab.core import BadInput
from kvlab.sim.chain import TokenBlocks
from kvlab.sim.readers.base import Reader

BUNDLED = Path(__file__).parents[2] / "assets" / "reference" / "tokenizer.json"


class TextReader(Reader):
    """A prompt is its messages, each tokenized on its own: `<|role|>`, a line end, content, calls.

    tokenizer: a tokenizer.json or a folder with one; None is the bundled one.
    """

    default_block = 16
    whole_blocks = True
    tokenizes = True

    def start(self) -> tuple[Tokens, TokenBlocks]:
        file = BUNDLED if self.tokenizer is None else Path(self.tokenizer)
        self.note(f"text is tokenized by {'the bundled tokenizer' if file == BUNDLED else file}")
        self.note("messages are joined as <|role|>, content, calls; not by a model's template")
        return Tokens(file), TokenBlocks(self.block_size)


class Tokens:
    """Texts to int32 tokens; equal texts give the same array."""

    def __init__(self, file: Path):
        from tokenizers import Tokenizer

        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise BadInput("trace.tokenizer", file, "no such tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(file))
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, text: str) -> np.ndarray:
        if text not in self._known:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            self._known[text] = np.array(ids, dtype=np.int32)
        return self._known[text]


def rendered(role: str, content: object, calls: object = None) -> str:
    """The text of a message; content may be a text, parts with texts, or nothing."""
    if isinstance(content, list):
        texts = (p.get("text", "") if isinstance(p, dict) else p for p in content)
        content = "".join(map(str, texts))
    called = json.dumps(calls, sort_keys=True) if calls else ""
    return f"<|{role}|>\n{content or ''}{called}\n"


def parquet_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, dict]]:
    """(place, values) of each row of a Parquet file, or of a folder of them."""
    import pyarrow.parquet as parquet

    for file in parquet_files(path):
        try:
            opened = parquet.ParquetFile(file)
            here = [name for name in columns if name in opened.schema_arrow.names]
            number = 0
            for batch in opened.iter_batches(batch_size=1024, columns=here):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise BadInput("trace.path", file, f"cannot be read: {error}") from None


def parquet_fields(path: Path) -> frozenset[str]:
    import pyarrow.parquet as parquet

    try:
        return frozenset(parquet.read_schema(parquet_files(path)[0]).names)
    except (OSError, ValueError) as error:
        raise BadInput("trace.path", path, f"cannot be read: {error}") from None
