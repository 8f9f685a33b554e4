"""Known prefixes on disk: safetensors and a manifest, for the next process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from kvlab.cache import manifest as manifests
from kvlab.cache.layers import Layers
from kvlab.cache.lineage import Lineage
from kvlab.cache.manifest import APART, Manifest, StoredBlock, StoredFile, refused
from kvlab.core import BadInput, BlockId, KvlabError

SHARD_BYTES = 1 << 30  # of one data file, so that neither side holds more in host memory
KINDS = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3", torch.int32: "I32"}
FIRST = ("k_data", "v_data")  # of what is kept apart


class Stored(NamedTuple):
    """What was saved or loaded; blocks that the cache knew already are not counted."""

    blocks: int
    tokens: int
    nbytes: int


class Known(NamedTuple):
    """A block to be saved: where it is in each layer group, and how it is found again."""

    ids: list[BlockId]
    stored: StoredBlock


def save(
    layers: Layers, lineage: Lineage, folder: str | Path, handles: Iterable | None = None
) -> Stored:
    """Write known prefixes of a cache to `folder`; an earlier store there is replaced.

    handles: only their prefixes; by default everything that is known and can be found. The folder
    appears whole or not at all. Raises `BadInput` where it holds anything else.
    """
    folder = Path(os.path.abspath(folder))
    _check_target(folder)
    known = _known(layers, lineage, None if handles is None else list(handles))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        new = Path(place) / "new"
        new.mkdir()
        files = _write_blocks(layers, new, known)
        manifests.write(new, facts(layers, lineage), [k.stored for k in known], files)
        if folder.exists():
            folder.rename(Path(place) / "old")
        new.rename(folder)
    size = layers.geometry.block_size
    return Stored(len(known), len(known) * size, sum(file.bytes for file in files))


def _check_target(folder: Path) -> None:
    if not folder.parent.is_dir():
        raise refused(folder, f"there is no folder {folder.parent}")
    if folder.exists() and not folder.is_dir():
        raise refused(folder, "is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / manifests.NAME).is_file():
        raise refused(folder, "holds something else; choose an empty or a new folder")


def facts(layers: Layers, lineage: Lineage) -> dict:
    """What a store and a cache must agree on."""
    g, format = layers.geometry, layers.spec.format
    stored = g.stored
    shape = {"layers": g.layers, "query_heads": g.query_heads, "kv_heads": stored.kv_heads,
             "head_dim": stored.k_width}
    if stored.v_width != stored.k_width:
        shape["value_width"] = stored.v_width
    each = format.each(g.layers)
    planes = _planes(layers, each[0])
    if any(other.identity != each[0].identity for other in each):
        planes = {f"{layer}.{name}": plane for layer, format in enumerate(each)
                  for name, plane in _planes(layers, format).items()}  # fmt: skip
    return {"model": lineage.facts.identity, "format": format.identity, "dtype": str(layers.dtype),
            "block_size": g.block_size, "geometry": shape, "planes": planes,
            "identity": lineage.identity}


def _planes(layers: Layers, format) -> dict[str, list]:
    """Plane of a layer of this format -> [safetensors dtype, shape]."""
    stored = layers.geometry.stored
    planes = {n: [KINDS[p.dtype], list(p.shape)]
              for n, p in format.planes_of(stored, layers.geometry.block_size).items()}  # fmt: skip
    for n, width in zip(FIRST, (stored.k_width, stored.v_width)) if format.sinks else ():
        planes[APART + n] = [KINDS[layers.dtype], [stored.kv_heads, format.sinks, width]]
    return planes


def _known(layers: Layers, lineage: Lineage, handles: list | None) -> list[Known]:
    """Blocks that every layer group holds, each behind its parent."""
    indices = [group.held.known.index for group in layers.groups]
    if any(h.identity != lineage.identity for h in handles or ()):
        raise KvlabError("the model has changed since this prefix handle was made: attach it anew")
    wanted = None if handles is None else {b for h in handles for b in h.ids}
    known: list[Known] = []
    place: dict[BlockId, int] = {}
    for id, parent, name, tokens in indices[0].reachable():
        lost = parent is not None and parent not in place
        if lost or (wanted is not None and id not in wanted):
            continue
        before = None if parent is None else known[place[parent]]
        ids = [id] + [index.behind(before and before.ids[n], tokens)
                      for n, index in enumerate(indices[1:], 1)]
        if None not in ids:
            place[id] = len(known)
            known.append(Known(ids, StoredBlock(place.get(parent, -1), name, tokens)))
    return known


def _write_blocks(layers: Layers, folder: Path, known: list[Known]) -> list[StoredFile]:
    per_file = max(1, SHARD_BYTES // layers.spec.format.block_bytes(layers.geometry))
    files = []
    for number, first in enumerate(range(0, len(known), per_file)):
        part = known[first : first + per_file]
        path = folder / f"blocks-{number:05d}.safetensors"
        save_file(dict(_tensors(layers, part)), path)
        files.append(StoredFile(path.name, path.stat().st_size, manifests.file_checksum(path),
                                first, len(part)))
    return files


def _tensors(layers: Layers, part: list[Known]):
    for layer, (number, local) in enumerate(layers.place):
        pool = layers.groups[number].pool
        planes = pool.sealed.read(local, [k.ids[number] for k in part])
        for name, plane in planes.items():
            yield f"layer.{layer}.{name}", plane.cpu().contiguous()
        first = [k.ids[number] for k in part if k.stored.parent < 0 and pool.apart.tokens]
        for name in FIRST if first else ():
            kept = torch.stack([pool.apart.row(local, id)[name] for id in first])
            yield f"layer.{layer}.{APART}{name}", kept.cpu().contiguous()


def load(layers: Layers, lineage: Lineage, folder: str | Path) -> Stored:
    """Make the prefixes stored in `folder` known.

    Raises `BadInput` with one sentence, before anything has changed, where model, format, block
    size or shape differ, where a file is missing, truncated, altered or too much, and where the
    budget has too little room.
    """
    manifest = manifests.read(Path(folder), facts(layers, lineage))
    for file in manifest.files:
        manifests.check_tensors(manifest, file)
    places = [_Place(group, manifest) for group in layers.groups]
    try:
        for place in places:
            place.take_room()
        for file in manifest.files:
            _read_blocks(layers, manifest, file, places)
    except BaseException:
        for place in places:
            place.undo()
        raise
    for place in places:
        place.settle()
    new = len(places[0].new)
    return Stored(new, new * layers.geometry.block_size,
                  new * layers.spec.format.block_bytes(layers.geometry))


class _Place:
    """Where the blocks of a manifest go in one layer group; `new`: those it does not know."""

    def __init__(self, group, manifest: Manifest):
        self.group, self.manifest = group, manifest
        self.ids: list[BlockId | None] = []
        for block in manifest.blocks:
            before = None if block.parent < 0 else self.ids[block.parent]
            there = block.parent < 0 or before is not None
            known = group.held.known.index.behind(before, block.tokens) if there else None
            self.ids.append(known)
        self.new = [i for i, id in enumerate(self.ids) if id is None]
        self.pins: list[BlockId] = []
        self.taken: list[BlockId] = []

    def take_room(self) -> None:
        ledger, count = self.group.ledger, len(self.new)
        self.pins = [id for id in self.ids if id is not None]
        ledger.pin(self.pins)  # or making room would evict what the store continues
        room = None if ledger.capacity is None else ledger.free_count + ledger.evictable_count
        if room is not None and room < count:
            raise BadInput("cache.budget_blocks", ledger.capacity,
                           f"has room for {room} of the {count} blocks of {self.manifest.folder}")
        self.taken = self.group.held.room.allocate(None, count)
        for index, id in zip(self.new, self.taken):
            self.ids[index] = id

    def undo(self) -> None:
        self.group.pool.drop(self.taken)
        self.group.ledger.free(self.taken)
        self.group.ledger.unpin(self.pins)

    def settle(self) -> None:
        """Seal and make known, the deepest sealed first, so that it is the first to leave."""
        known, blocks = self.group.held.known, self.manifest.blocks
        depth: list[int] = []
        for block in blocks:
            depth.append(0 if block.parent < 0 else depth[block.parent] + 1)
        order = self.new[::-1]
        self.group.ledger.seal(
            [self.ids[i] for i in order], [blocks[i].name for i in order],
            [depth[i] for i in order], cost=[known.cost(depth[i]) for i in order],
            parent=[None if (p := blocks[i].parent) < 0 else blocks[p].name for i in order],
        )
        for index in self.new:
            before = blocks[index].parent
            parent = None if before < 0 else self.ids[before]
            known.index.graft(parent, blocks[index].tokens, self.ids[index])
        self.group.ledger.unpin(self.pins)


def _read_blocks(
    layers: Layers, manifest: Manifest, file: StoredFile, places: list[_Place]
) -> None:
    tensors = load_file(manifest.folder / file.name)
    for layer, (number, local) in enumerate(layers.place):
        place = places[number]
        new = [i for i in place.new if file.first <= i < file.first + file.count]
        if not new:
            continue
        rows = torch.tensor(new) - file.first
        pool, ids = place.group.pool, [place.ids[i] for i in new]
        planes = {n: tensors[f"layer.{layer}.{n}"][rows].to(layers.device)
                  for n in pool.sealed.planes}
        pool.sealed.commit(ids)
        pool.sealed.write(local, ids, planes)
        stored = [i for i in range(file.first, file.first + file.count) if manifest.begins(i)]
        for n, i in enumerate(stored if pool.apart.tokens else ()):
            if i in new:
                pool.apart.take([place.ids[i]])
                kept = (tensors[f"layer.{layer}.{APART}{name}"][n].to(layers.device).transpose(0, 1)
                        for name in FIRST)
                pool.apart.write(local, place.ids[i], *kept)
