"""GGUF files: the model that was written comes back, converted once, or one sentence says why."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="the extra `gguf` is not installed: package gguf")
pytest.importorskip("accelerate", reason="the extra `gguf` is not installed: package accelerate")

from gguf_files import TEMPLATE, yarn
from transformers import AutoModelForCausalLM

from kvlab.core import BadInput
from kvlab.model import checkpoint, gguf_convert
from kvlab.model.gguf_config import config_of
from kvlab.model.gguf_header import read_header
from kvlab.model.load import FolderModel, GgufModel, HubModel, ReferenceModel

TEXT = "Dorothea looked out of the window; 1,204 sheep, said nothing.\n\n  Not  one."
IDS = torch.arange(40)[None] * 7 % 512
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 16}


def llama3_divisors(model) -> np.ndarray:
    plain = 5e5 ** -(torch.arange(0, 32, 2) / 32)
    return (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)


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


def test_the_cache_folder_follows_the_users_settings(cache, monkeypatch, tmp_path):
    assert gguf_convert.cache_folder() == cache
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
