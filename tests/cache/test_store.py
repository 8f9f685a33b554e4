"""Stored prefixes: another process goes on with equal tokens, and damage is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from driver import held_bytes
from safetensors.torch import load_file, save_file

from kvlab.cache import manifest as manifests
from kvlab.core import BadInput
from kvlab.format import NAMES, by_name
from kvlab.model import PagedCache, prefill

SIZE = 8
ROOT = Path(__file__).resolve().parents[2]


def paged(model, **axes) -> PagedCache:
    return PagedCache.for_model(model, **{"format": "fp32", "block_size": SIZE, "prefix": "hash"}
                                | axes)


def prompt(count, seed=0):
    return torch.randint(1, 128, (1, count), generator=torch.Generator().manual_seed(seed))


def serve(model, cache, ids):
    result = prefill(model, ids, cache, chunk_tokens=16)
    cache.finish()
    return result


@pytest.fixture
def model(tiny_model):
    return tiny_model()


@pytest.fixture
def store(model, tmp_path):
    cache = paged(model)
    for seed in (0, 1):
        serve(model, cache, torch.cat([prompt(24), prompt(20, seed + 5)], 1))
    cache.save(tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("name", [*NAMES, by_name("int4", sinks=4)], ids=str)
def test_every_format_comes_back_as_it_was(model, tmp_path, name):
    ids, old = prompt(60), paged(model, format=name, block_size=16)
    serve(model, old, ids)
    saved = old.save(tmp_path / "store")
    assert (saved.blocks, saved.tokens) == (3, 48)
    new = paged(model, format=name, block_size=16)
    assert new.load(tmp_path / "store").blocks == 3
    new.check()
    warm, again = serve(model, old, ids), serve(model, new, ids)
    assert warm.cached == again.cached == 48 and torch.equal(warm.logits, again.logits)


@pytest.mark.parametrize("writer", ["all", "per_layer"])
@pytest.mark.parametrize("reader", ["all", "per_layer"])
def test_layer_groups_do_not_matter(model, tmp_path, writer, reader):
    ids, old = prompt(60), paged(model, groups=writer)
    serve(model, old, ids)
    old.save(tmp_path / "store")
    new = paged(model, groups=reader)
    new.load(tmp_path / "store")
    assert torch.equal(serve(model, old, ids).logits, serve(model, new, ids).logits)


RESTART = """
import sys, torch
sys.path.insert(0, "tests")
from tiny import make_tiny_model
from kvlab import PagedCache
model, ids = make_tiny_model(), torch.tensor([eval(sys.argv[2])])
model.generation_config.pad_token_id = None
cache = PagedCache.for_model(model, format="fp32", block_size=8, prefix="hash")
cache.load(sys.argv[1])
out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=12)
print(cache.audit()[0]["hit_tokens"], out[0, ids.shape[1]:].tolist())
"""


def test_a_fresh_process_goes_on_with_equal_tokens(model, store):
    model.generation_config.pad_token_id = None
    ids = torch.cat([prompt(24), prompt(20, 5), prompt(7, 9)], 1)
    options = {"do_sample": False, "max_new_tokens": 12}
    cold = model.generate(ids, past_key_values=paged(model, prefix="none"), **options)
    command = [sys.executable, "-c", RESTART, str(store), str(ids[0].tolist())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"40 {cold[0, ids.shape[1]:].tolist()}"


def test_what_is_known_already_is_not_loaded_twice(model, store):
    cache = paged(model)
    serve(model, cache, torch.cat([prompt(24), prompt(20, 5)], 1))
    assert cache.load(store).blocks == 2
    blocks = cache.stats().blocks
    assert cache.load(store).blocks == 0 and cache.stats().blocks == blocks == 7
    cache.check()
    cache.groups[0].held.known.index.check()
    cache.reset()
    assert held_bytes(cache) == 0


def test_loaded_prefixes_leave_from_the_tail(model, store):
    cache = paged(model, policy="lru", budget_blocks=7)
    cache.load(store)
    serve(model, cache, prompt(4 * SIZE, 77))
    assert cache.attach_prefix(prompt(25)[0].tolist()).tokens == 24


def test_only_the_prefixes_of_handles(model, store, tmp_path):
    cache = paged(model)
    cache.load(store)
    handle = cache.attach_prefix(prompt(24)[0].tolist())
    assert cache.save(tmp_path / "head", [handle]).blocks == 3
    assert cache.save(store).blocks == 7, "an earlier store is replaced"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head", "store"]


def test_room_is_needed_and_nothing_happens_without(model, store):
    cache = paged(model, policy="lru", budget_blocks=6)
    serve(model, cache, torch.cat([prompt(24), prompt(20, 5)], 1))
    handle, before = cache.cache_prefix(prompt(24)[0].tolist()), cache.stats()
    with pytest.raises(BadInput, match="has room for 1 of the 2 blocks"):
        cache.load(store)
    assert cache.stats() == before and handle.pinned
    cache.check()


def test_a_folder_with_anything_else_is_not_overwritten(model, tmp_path):
    cache = paged(model)
    serve(model, cache, prompt(20))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for folder, words in (("mine", "something else"), ("mine/thesis.txt", "not a folder"),
                          ("no/where", "there is no folder")):
        with pytest.raises(BadInput, match=words):
            cache.save(tmp_path / folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    with pytest.raises(BadInput, match="choose prefix=hash"):
        paged(model, prefix="none").load(tmp_path)


# ---- damage


def body_of(folder) -> dict:
    return json.loads((folder / manifests.NAME).read_text())


def write_body(folder, body, sign=False):
    if sign:
        body["checksum"] = manifests.checksum_of(body)
    (folder / manifests.NAME).write_text(json.dumps(body))


def change(folder, key, value):
    write_body(folder, body_of(folder) | {key: value}, sign=True)


def data(folder) -> Path:
    return next(folder.glob("*.safetensors"))


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def sign_file(folder, path):
    """Someone who knows the format: file and manifest agree again."""
    body = body_of(folder)
    row = body["files"][0]
    row[0], row[1], row[2] = path.name, path.stat().st_size, manifests.file_checksum(path)
    write_body(folder, body, sign=True)


def retensor(folder, act):
    tensors = load_file(data(folder))
    act(tensors)
    save_file(tensors, data(folder))
    sign_file(folder, data(folder))


def edit_block(folder, index, act):
    body = body_of(folder)
    act(body["blocks"][index])
    write_body(folder, body, sign=True)


def first_layer(tensors):
    return "layer.0.k_data", tensors["layer.0.k_data"]


def drop_tensor(tensors):
    del tensors["layer.1.v_data"]


def cut_tensor(tensors):
    name, x = first_layer(tensors)
    tensors[name] = x[:-1].clone()


def retype_tensor(tensors):
    name, x = first_layer(tensors)
    tensors[name] = x.half()


def extra_tensor(tensors):
    tensors["layer.9.k_data"] = torch.zeros(1)


def replace_by_link(folder):
    path = data(folder)
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def make_folder(path):
    path.unlink()
    path.mkdir()


def drop_key(folder):
    body = body_of(folder)
    del body["blocks"]
    write_body(folder, body, sign=True)


DAMAGE = {
    "folder gone": (lambda f: shutil.rmtree(f), "no such folder"),
    "a file instead": (lambda f: (shutil.rmtree(f), f.write_text("x")), "is not a folder"),
    "manifest gone": (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
    "manifest cut": (lambda f: (f / "manifest.json").write_text('{"kind": "kv'), "cannot be read"),
    "manifest is binary": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"),
                           "cannot be read"),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[]"),
                           "not that of a prefix store"),
    "another kind": (lambda f: change(f, "kind", "recipe"), "not that of a prefix store"),
    "a later version": (lambda f: change(f, "version", 2), "has version 2; this kvlab reads 1"),
    "a key gone": (drop_key, "no usable 'blocks'"),
    "a key of another type": (lambda f: change(f, "files", "all"), "no usable 'files'"),
    "manifest altered": (lambda f: write_body(f, body_of(f) | {"dtype": "torch.int8"}),
                         "manifest.json was altered"),
    "another model": (lambda f: change(f, "model", "abc"), "made with another model"),
    "another format": (lambda f: change(f, "format", "int4"), "holds another format"),
    "another dtype": (lambda f: change(f, "dtype", "torch.float16"), "another dtype"),
    "another block size": (lambda f: change(f, "block_size", 16), "has another block size: 16"),
    "another shape": (lambda f: change(f, "geometry", {"layers": 3}), "another shape of model"),
    "other planes": (lambda f: change(f, "planes", {}), "in another way"),
    "data gone": (lambda f: data(f).unlink(), "is missing"),
    "data cut": (lambda f: data(f).write_bytes(data(f).read_bytes()[:-1]), "is truncated"),
    "data empty": (lambda f: data(f).write_bytes(b""), "is truncated: 0 of"),
    "data longer": (lambda f: data(f).write_bytes(data(f).read_bytes() + b"x"), "is longer"),
    "a bit of a tensor": (lambda f: flip(data(f), -1), "safetensors was altered"),
    "a bit of the header": (lambda f: flip(data(f), 12), "safetensors was altered"),
    "a file too many": (lambda f: (f / "notes.txt").write_text("x"), "not part of it: notes.txt"),
    "a folder for a file": (lambda f: make_folder(data(f)), "not a plain file"),
    "a link for a file": (replace_by_link, "not a plain file"),
    "a file outside": (lambda f: change(f, "files", [["../x", 1, "", 0, 7]]), "outside of it"),
    "files that overlap": (lambda f: change(f, "files", body_of(f)["files"] * 2),
                           "its files hold 14 blocks"),
    "a file row of nonsense": (lambda f: change(f, "files", [7]), "row that cannot be read: 7"),
    "a block row of nonsense": (lambda f: change(f, "blocks", [[0]]), "row that cannot be read"),
    "blocks fewer": (lambda f: change(f, "blocks", body_of(f)["blocks"][:-1]),
                     "manifest.json names 6"),
    "a token altered": (lambda f: edit_block(f, 2, lambda b: b[2].__setitem__(0, 3)),
                        "hash of block 2 does not follow"),
    "a token too many": (lambda f: edit_block(f, 2, lambda b: b[2].append(3)),
                         "block 2 does not hold 8 token ids"),
    "a token no number": (lambda f: edit_block(f, 2, lambda b: b[2].__setitem__(0, "a")),
                          "block 2 does not hold 8 token ids"),
    "a token too large": (lambda f: edit_block(f, 2, lambda b: b[2].__setitem__(0, 1 << 70)),
                          "block 2 does not hold 8 token ids"),
    "a block before its parent": (lambda f: edit_block(f, 0, lambda b: b.__setitem__(0, 3)),
                                  "comes before the one it continues"),
    "another parent": (lambda f: edit_block(f, 2, lambda b: b.__setitem__(0, 0)),
                       "hash of block 2 does not follow"),
    "a tensor gone": (lambda f: retensor(f, drop_tensor), "layer.1.v_data is missing"),
    "a tensor too many": (lambda f: retensor(f, extra_tensor), "layer.9.k_data is"),
    "a tensor too short": (lambda f: retensor(f, cut_tensor), "layer.0.k_data is"),
    "a tensor of another type": (lambda f: retensor(f, retype_tensor), 'layer.0.k_data is ["F16"'),
    "no safetensors": (lambda f: (data(f).write_bytes(b"PK" + bytes(90)), sign_file(f, data(f))),
                       "cannot be read"),
}  # fmt: skip


def test_there_are_enough_kinds_of_damage():
    assert len(DAMAGE) >= 20


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_with_a_sentence(model, store, kind):
    act, words = DAMAGE[kind]
    act(store)
    cache = paged(model)
    with pytest.raises(BadInput) as caught:
        cache.load(store)
    text = str(caught.value)
    assert words in text and text.startswith(f"store={store}: ") and "\n" not in text
    assert len(text) < 400
    cache.check()
    assert held_bytes(cache) == 0 and cache.stats().prefix_tokens == 0


@pytest.mark.parametrize(("axes", "words"), [
    ({"format": "int8"}, "holds another format"),
    ({"block_size": 16}, "has another block size: 8 there, 16 here"),
])  # fmt: skip
def test_another_cache_is_refused(model, store, axes, words):
    with pytest.raises(BadInput, match=words):
        paged(model, **axes).load(store)


def test_another_model_is_refused(tiny_model, store):
    with pytest.raises(BadInput, match="made with another model"):
        paged(tiny_model(seed=1)).load(store)
    one = tiny_model()
    one.model.layers[1].mlp.up_proj.weight.data[5, 7] *= 1.0001  # one weight is enough
    with pytest.raises(BadInput, match="made with another model"):
        paged(one).load(store)


def test_a_read_that_fails_half_way_leaves_nothing(model, store, monkeypatch):
    cache = paged(model)
    monkeypatch.setattr("kvlab.cache.store.load_file", lambda path: {}["gone"])
    with pytest.raises(KeyError):
        cache.load(store)
    cache.check()
    assert held_bytes(cache) == 0
