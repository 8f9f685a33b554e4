"""What a stored prefix says of itself, and every reason not to believe it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from xxhash import xxh3_64_intdigest, xxh3_128

from kvlab.blocks.chain import TOKEN, origin
from kvlab.core import BadInput

APART = "apart."  # before the names of planes of first tokens, see `pool.Apart`
KIND, VERSION, NAME = "kvlab prefix store", 1, "manifest.json"
FIELDS = {  # key -> type, and in words what a cache of another value has
    "model": (str, "was made with another model"),
    "format": (str, "holds another format"),
    "dtype": (str, "was computed in another dtype"),
    "block_size": (int, "has another block size"),
    "geometry": (dict, "is of another shape of model"),
    "planes": (dict, "lays its blocks out in another way"),
    "blocks": (list, ""),
    "files": (list, ""),
}


class StoredFile(NamedTuple):
    """One data file: `count` blocks from `first` on."""

    name: str
    bytes: int
    checksum: str
    first: int
    count: int


class StoredBlock(NamedTuple):
    """parent: index of the block before, -1 for none; name: chained hash; tokens: as bytes."""

    parent: int
    name: int
    tokens: bytes


class Manifest(NamedTuple):
    """A store that is whole as far as its manifest goes."""

    folder: Path
    blocks: list[StoredBlock]
    files: list[StoredFile]
    planes: dict[str, list]  # plane -> [safetensors dtype, shape]; LAYER.plane where they differ
    layers: int

    def tensors(self, count: int, first: int) -> dict[str, tuple[str, list[int]]]:
        """Those of `count` blocks, of which `first` begin a sequence."""
        found = {}
        for name, (kind, shape) in self.planes.items():
            layer, _, plane = name.partition(".")
            own = layer.isdigit()
            plane, layers = (plane, [layer]) if own else (name, range(self.layers))
            here = first if plane.startswith(APART) else count
            found |= {f"layer.{n}.{plane}": (kind, [here, *shape]) for n in layers if here}
        return found

    def begins(self, index: int) -> bool:
        """Whether a block holds first tokens: only such have planes `APART`."""
        return self.blocks[index].parent < 0


def write(folder: Path, facts: dict, blocks: list[StoredBlock], files: list[StoredFile]) -> None:
    rows = [[b.parent, f"{b.name:016x}", np.frombuffer(b.tokens, TOKEN).tolist()] for b in blocks]
    body = {"kind": KIND, "version": VERSION, **facts, "blocks": rows,
            "files": [list(file) for file in files]}
    body["checksum"] = checksum_of(body)
    (folder / NAME).write_text(json.dumps(body), encoding="utf-8")


def read(folder: Path, facts: dict) -> Manifest:
    """The manifest of `folder`, if it fits a cache of these `facts` and its files are as it says.

    Reads every byte once. Raises `BadInput` with one sentence saying what is wrong.
    """
    body = _parsed(folder)
    for key, (_, words) in FIELDS.items():
        if key in facts and body[key] != facts[key]:
            raise refused(folder, f"{words}: {brief(body[key])} there, {brief(facts[key])} here")
    files = [StoredFile(*_row(folder, row, (str, int, str, int, int))) for row in body["files"]]
    blocks = _blocks(folder, body, facts)
    _check_files(folder, files, len(blocks))
    return Manifest(folder, blocks, files, body["planes"], body["geometry"]["layers"])


def _parsed(folder: Path) -> dict:
    """The manifest with all keys of the right type, unaltered."""
    if not folder.is_dir():
        raise refused(folder, "is not a folder" if folder.exists() else "no such folder")
    try:
        body = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refused(folder, f"holds no {NAME}; a folder that cache.save made is wanted") from None
    except (OSError, ValueError) as error:
        raise refused(folder, f"{NAME} cannot be read: {error}") from None
    if not isinstance(body, dict) or body.get("kind") != KIND:
        raise refused(folder, f"{NAME} is not that of a prefix store")
    if body.get("version") != VERSION:
        raise refused(folder, f"has version {body.get('version')}; this kvlab reads {VERSION}")
    for key, (kind, _) in FIELDS.items():
        if not isinstance(body.get(key), kind):
            raise refused(folder, f"{NAME} has no usable {key!r}")
    if body.get("checksum") != checksum_of(body):
        raise refused(folder, f"{NAME} was altered: its checksum does not match")
    return body


def _row(folder: Path, row: object, kinds: tuple) -> list:
    if not isinstance(row, list) or [type(x) for x in row] != list(kinds):
        raise refused(folder, f"{NAME} has a row that cannot be read: {brief(row)}")
    return row


def _blocks(folder: Path, body: dict, facts: dict) -> list[StoredBlock]:
    """Blocks whose names follow from their tokens, each behind its parent."""
    size, blocks = body["block_size"], []
    start = origin(facts["identity"], size)
    for index, row in enumerate(body["blocks"]):
        parent, name, tokens = _row(folder, row, (int, str, list))
        if not -1 <= parent < index:
            raise refused(folder, f"block {index} comes before the one it continues")
        if len(tokens) != size or any(type(t) is not int or not 0 <= t < 1 << 63 for t in tokens):
            raise refused(folder, f"block {index} does not hold {size} token ids")
        raw = np.array(tokens, dtype=TOKEN).tobytes()
        want = xxh3_64_intdigest(raw, start if parent < 0 else blocks[parent].name)
        if name != f"{want:016x}":
            raise refused(folder, f"the hash of block {index} does not follow from its tokens")
        blocks.append(StoredBlock(parent, want, raw))
    if len({(b.parent, b.tokens) for b in blocks}) < len(blocks):
        raise refused(folder, "holds a block twice")
    return blocks


def _check_files(folder: Path, files: list[StoredFile], blocks: int) -> None:
    """Exactly these files, each of this size and content, and together all blocks."""
    there = {path.name for path in folder.iterdir()} - {NAME}
    for file in files:
        if Path(file.name).name != file.name:
            raise refused(folder, f"names a file outside of it: {file.name}")
        if file.name not in there:
            raise refused(folder, f"the file {file.name} is missing")
    extra = sorted(there - {file.name for file in files})
    if extra:
        raise refused(folder, f"holds a file that is not part of it: {extra[0]}")
    covered = [i for file in files for i in range(file.first, file.first + file.count)]
    if covered != list(range(blocks)):
        raise refused(folder, f"its files hold {len(covered)} blocks, {NAME} names {blocks}")
    for file in files:
        _check_bytes(folder, file)


def _check_bytes(folder: Path, file: StoredFile) -> None:
    path = folder / file.name
    if path.is_symlink() or not path.is_file():
        raise refused(folder, f"{file.name} is not a plain file")
    size = path.stat().st_size
    if size != file.bytes:
        word = "truncated" if size < file.bytes else "longer than it was"
        raise refused(folder, f"{file.name} is {word}: {size} of {file.bytes} bytes")
    if file_checksum(path) != file.checksum:
        raise refused(folder, f"{file.name} was altered: its checksum does not match")


def check_tensors(manifest: Manifest, file: StoredFile) -> None:
    """A data file holds each plane of each layer and nothing else. Raises `BadInput`."""
    first = sum(manifest.begins(i) for i in range(file.first, file.first + file.count))
    want = manifest.tensors(file.count, first)
    try:
        with safe_open(manifest.folder / file.name, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            have = {n: (x.get_dtype(), list(x.get_shape())) for n, x in slices.items()}
    except (SafetensorError, OSError) as error:
        raise refused(manifest.folder, f"{file.name} cannot be read: {error}") from None
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise refused(manifest.folder, f"{file.name}: {name} is {brief(have.get(name))}, not "
                                           f"{brief(want.get(name))}")


def checksum_of(body: dict) -> str:
    """Of everything in a manifest but the checksum. Finds damage; it is no signature."""
    rest = {key: value for key, value in body.items() if key != "checksum"}
    return xxh3_128(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_checksum(path: Path) -> str:
    digest = xxh3_128()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def refused(folder: Path, remedy: str) -> BadInput:
    return BadInput("store", folder, remedy)


def brief(value: object) -> str:
    text = json.dumps(value, default=str) if value is not None else "missing"
    return text if len(text) <= 60 else text[:57] + "..."
