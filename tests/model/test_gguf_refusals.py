"""GGUF files that cannot be loaded: one sentence each, and nothing left behind."""

from __future__ import annotations

import struct

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the extra `gguf` is not installed: package gguf")

import gguf
from gguf_files import yarn

from kvlab.core import BadInput
from kvlab.model import gguf_convert
from kvlab.model.load import GgufModel


def cut(share: float):
    def change(path):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return change


def overwrite(at: int, data: bytes):
    def change(path):
        old = path.read_bytes()
        path.write_bytes(old[:at] + data + old[at + len(data) :])

    return change


def wrong_type(path):
    """The type of the first tensor becomes one that nobody knows."""
    name = b"token_embd.weight"
    at = path.read_bytes().index(name) + len(name) + 4 + 2 * 8
    overwrite(at, struct.pack("<I", 250))(path)


DAMAGE = {
    "gone": (lambda path: path.unlink(), "no such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "model=local"),
    "empty": (lambda path: path.write_bytes(b""), "no GGUF file"),
    "other magic": (overwrite(0, b"PK"), "no GGUF file"),
    "other version": (overwrite(4, b"\x07"), "GGUF version 7"),
    "big endian": (overwrite(4, b"\0\0\0\3"), "GGUF version"),
    "cut in the metadata": (cut(0.01), "damaged or cut short: its header"),
    "cut in the weights": (cut(0.9), "is cut short: .* bytes"),
    "a length beyond the file": (overwrite(24, b"\xff" * 7), "damaged or cut short"),
    "too many keys": (overwrite(16, b"\xff" * 7), "damaged or cut short"),
    "too many tensors": (overwrite(8, b"\xff" * 7), "damaged or cut short"),
    "type of a tensor": (wrong_type, "of type 250"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(written, name, cache):
    damage, message = DAMAGE[name]
    path, _ = written()
    damage(path)
    with pytest.raises(BadInput, match=message) as caught:
        GgufModel(str(path)).load("cpu")
    assert caught.value.key == "model.path" and "\n" not in str(caught.value)
    assert not cache.exists() or not [p for p in (cache / "gguf").iterdir() if p.is_dir()]


def key(name: str, value):
    add = {int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    return lambda writer: getattr(writer, add[type(value)])(name, value)


def several(*changes):
    def change(writer):
        for one in changes:
            one(writer)

    return change


LAST = {"a": np.ones((8, 8), np.float32), "v": np.ones(16, np.float32)}
FOREIGN = {
    "experts": (key("llama.expert_count", 8), {}, "llama.expert_count=8"),
    "a logit scale": (key("llama.logit_scale", 0.5), {}, "llama.logit_scale=0.5"),
    "one of several parts": (key("split.count", 3), {}, "one of several parts"),
    "longrope": (key("llama.rope.scaling.type", "longrope"), {}, "'longrope' is not supported"),
    "yarn of its own": (
        several(yarn, key("llama.rope.scaling.yarn_beta_fast", 16.0)), {}, "with yarn_beta_fast"),
    "an unknown tensor": (None, {"blk.0.attn_gate.weight": LAST["a"]}, "blk.attn_gate.weight"),
    "half of the biases": (None, {"blk.0.attn_q.bias": np.ones(128, np.float32)}, "do not fit"),
    "other divisors": (None, {"rope_freqs.weight": LAST["v"] * 2}, "no scaling of Llama 3.1"),
    "divisors of another shape": (None, {"rope_freqs.weight": LAST["a"]}, "each rotary pair"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_transformers_would_compute_otherwise_is_refused(written, name):
    change, extra, message = FOREIGN[name]
    path, _ = written(change=change, extra=extra)
    with pytest.raises(BadInput, match=message):
        GgufModel(str(path)).load("cpu")


def renamed(monkeypatch, **changes):
    """Metadata as another writer would have put it."""
    write = gguf.GGUFWriter.add_key_value

    def change(self, name, value, kind, sub_type=None):
        if name.rpartition(".")[2] in changes:
            value = changes[name.rpartition(".")[2]]
            kind = {str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}.get(
                type(value), kind)
        return write(self, name, value, kind, sub_type)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", change)


@pytest.mark.parametrize(("changes", "message"), [
    ({"architecture": "gpt2"}, "architecture 'gpt2' is not supported; known: llama, mistral"),
    ({"architecture": "llama4"}, "architecture 'llama4' is not supported"),
    ({"head_count_kv": [2, 1]}, r"head_count_kv is \[2, 1\], one number is wanted"),
    ({"value_length": 16}, "keys have 32 channels, values or rotary pairs span 16"),
    ({"dimension_count": 16}, "keys have 32 channels, values or rotary pairs span 16"),
    ({"block_count": 3}, "weights are missing, the first is"),
    ({"feed_forward_length": 64}, r"is \[128, 64\], its metadata say \[64, 64\]"),
    ({"model": "rwkv"}, "its tokenizer 'rwkv' is not supported; known: gpt2, llama"),
])
def test_metadata_that_does_not_fit_is_refused(written, monkeypatch, changes, message):
    renamed(monkeypatch, **changes)
    path, _ = written()
    with pytest.raises(BadInput, match=message):
        GgufModel(str(path)).load("cpu")


def test_a_missing_extra_is_named(written, monkeypatch):
    path, _ = written()
    monkeypatch.setattr(gguf_convert, "find_spec", lambda name: None if name == "gguf" else 1)
    with pytest.raises(BadInput, match=r"not installed \(gguf\): pip install 'kvlab\[gguf\]'"):
        GgufModel(str(path)).load("cpu")


def test_llama_3_splits_its_text_or_is_refused(written, monkeypatch):
    path, _ = written(pre="llama-bpe")
    try:
        split = GgufModel(str(path)).load("cpu").tokenizer.backend_tokenizer.to_str()
        assert "p{N}{1,3}" in split
    except BadInput as error:
        assert "splits text otherwise than its tokenizer 'llama-bpe'" in str(error)
    monkeypatch.setitem(gguf_convert.SPLITS, "smollm", "no such expression")
    with pytest.raises(BadInput, match="splits text otherwise than its tokenizer 'smollm'"):
        GgufModel(str(written()[0])).load("cpu")
