"""Checkpoints: loaded from safetensors alone, refused by name, asked for without long waits."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from toys import ARCHITECTURES

from kvlab import hub
from kvlab.core import BadInput
from kvlab.model import checkpoint
from kvlab.model.load import (
    REFERENCE,
    FolderModel,
    HubModel,
    OutlierModel,
    RandomModel,
    ReferenceModel,
    resolve_dtype,
)

TEXT = "Dorothea looked out of the window, and for a long time she said nothing at all."


@pytest.fixture
def folder(tmp_path, tiny_model):
    """A checkpoint folder as a user has it: config, safetensors, tokenizer."""

    def make(architecture: str = "Qwen3"):
        model = tiny_model(architecture, vocab_size=8192)
        model.save_pretrained(tmp_path / architecture)
        shutil.copy(REFERENCE / "tokenizer.json", tmp_path / architecture)
        return tmp_path / architecture, model

    return make


def loss(loaded) -> float:
    ids = torch.tensor([loaded.tokenizer(TEXT)["input_ids"]])
    return loaded.model(ids, labels=ids).loss.item()


def test_reference_is_trained_and_named():
    loaded = ReferenceModel().load("cpu")
    assert loaded.model.dtype == torch.float32 and not loaded.random
    assert loaded.tokenizer.eos_token == "<|endoftext|>"
    assert loss(loaded) < 5.0 < loss(RandomModel(64, 2, 4, 2, 32, 128).load("cpu"))


def test_outliers_change_keys_and_not_the_function():
    plain, blown = ReferenceModel().load("cpu"), OutlierModel(factor=16.0).load("cpu")
    ids = torch.tensor([plain.tokenizer(TEXT)["input_ids"]])
    assert torch.allclose(plain.model(ids).logits, blown.model(ids).logits, atol=1e-4)
    keys = [m.model(ids).past_key_values.layers[0].keys.abs().amax() for m in (plain, blown)]
    assert keys[1] > 4 * keys[0]
    assert plain.identity != blown.identity


def test_outliers_touch_both_halves_of_a_rotary_pair():
    config = ReferenceModel().load("cpu").model.config
    pairs = OutlierModel(channels=2)._pairs(config)
    assert pairs[2:] == [d + 64 for d in pairs[:2]] and len(set(pairs)) == 4


@pytest.mark.parametrize("settings", [{"channels": -1}, {"factor": 0.0}])
def test_outlier_ranges(settings):
    with pytest.raises(BadInput, match=next(iter(settings))):
        OutlierModel(**settings)


def test_outliers_need_their_channels_and_a_qwen3(folder):
    with pytest.raises(BadInput, match="64 rotary pairs"):
        OutlierModel(channels=65).load("cpu")
    with pytest.raises(BadInput, match="k_norm"):
        OutlierModel(path=str(folder("Llama")[0])).load("cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_local_folder_answers_as_the_model_saved(folder, architecture):
    path, model = folder(architecture)
    loaded = FolderModel(str(path), dtype="float32").load("cpu")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert loaded.name == architecture and not loaded.model.training


def test_hub_model_takes_a_folder_instead(folder):
    loaded = HubModel("Qwen/Qwen3-0.6B", path=str(folder()[0])).load("cpu")
    assert loaded.name == "Qwen3-0.6B"


def test_identity_follows_config_and_weights(folder):
    path, _ = folder()
    first = checkpoint.identity(path)
    assert checkpoint.identity(shutil.copytree(path, path.parent / "copy")) == first
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = checkpoint.identity(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert len({first, changed, checkpoint.identity(path)}) == 3


def test_random_model_is_seeded_and_marked():
    shape = {"hidden_size": 64, "layers": 1, "query_heads": 4, "kv_heads": 2, "head_dim": 32,
             "mlp_size": 64, "vocabulary": 8192}
    a, b, other = (RandomModel(**shape, seed=seed).load("cpu") for seed in (0, 0, 1))
    weight = [m.model.model.embed_tokens.weight for m in (a, b, other)]
    assert torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])
    assert a.random and a.identity == b.identity != other.identity
    assert max(a.tokenizer(TEXT)["input_ids"]) < 8192


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"layers": 0}, "layers"),
        ({"query_heads": 5}, "query_heads"),
        ({"head_dim": 33}, "head_dim"),
        ({"vocabulary": 100}, "vocabulary"),
    ],
)
def test_random_shapes_are_checked(settings, key):
    with pytest.raises(BadInput) as caught:
        RandomModel(**settings)
    assert caught.value.key == key


def test_dtype_follows_the_device():
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("auto", "cuda") == torch.bfloat16
    assert resolve_dtype("float16", "cpu") == torch.float16


# ---- folders that cannot be loaded


def without(name):
    return lambda path: (path / name).unlink()


def write(name, data):
    return lambda path: (path / name).write_bytes(data)


def change_config(**changes):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return change


def truncate(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickle_only(path):
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def lose_a_shard(path):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_weight(path):
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


DAMAGE = {
    "no config": (without("config.json"), "holds no config.json"),
    "config is no json": (write("config.json", b"{"), "config.json cannot be read"),
    "config is a list": (write("config.json", b"[]"), "architecture None"),
    "other architecture": (change_config(model_type="mine"), "'mine' is no language model of"),
    "quantized": (change_config(quantization_config={"bits": 4}), "quantized"),
    "no weights": (without("model.safetensors"), "holds no model.safetensors"),
    "pickled weights": (pickle_only, "only pickled weights; convert them to safetensors"),
    "truncated": (truncate, "is truncated"),
    "empty weights": (write("model.safetensors", b""), "truncated or no safetensors"),
    "no safetensors": (write("model.safetensors", b"\x08" + bytes(7) + b"nonsense"), "no safetens"),
    "missing shard": (lose_a_shard, "model-00002-of-00002.safetensors is missing"),
    "broken index": (write("model.safetensors.index.json", b"{}"), "index.json cannot be read"),
    "missing weight": (lose_a_weight, "model.layers.1.mlp.up_proj.weight"),
    "other shape": (change_config(hidden_size=32), "cannot be loaded"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer cannot be read"),
    "broken tokenizer": (write("tokenizer.json", b"{}"), "tokenizer cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folder_is_refused(folder, name):
    path, _ = folder()
    damage, message = DAMAGE[name]
    damage(path)
    with pytest.raises(BadInput) as caught:
        FolderModel(str(path)).load("cpu")
    assert caught.value.key == "model.path" and message in str(caught.value)


@pytest.mark.parametrize("path", ["/nowhere/at/all", __file__])
def test_path_that_is_no_folder_is_refused(path):
    with pytest.raises(BadInput, match="folder"):
        FolderModel(path).load("cpu")


def test_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path, tiny_model):
    tiny_model().save_pretrained(tmp_path)
    shutil.copy(REFERENCE / "tokenizer.json", tmp_path)
    with pytest.raises(BadInput, match="8192 ids"):
        FolderModel(str(tmp_path)).load("cpu")


def test_code_in_a_checkpoint_never_runs(folder):
    path, _ = folder()
    (path / "evil.py").write_text(f"open({str(path / 'ran')!r}, 'w')\nclass Model: pass\n")
    change_config(auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Model"})(path)
    FolderModel(str(path)).load("cpu")
    assert not (path / "ran").exists()


# ---- the hub


class Answer(BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """An HTTP server that answers every question with one status, as the hub's endpoint."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    made = HTTPServer(("127.0.0.1", 0), Answer)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("status", [200, 401, 404])
def test_a_hub_that_answers_is_reached(server, monkeypatch, status):
    monkeypatch.setattr(Answer, "status", status)
    assert hub.obstacle() is None


def test_a_proxy_that_refuses_is_no_answer(server, monkeypatch):
    monkeypatch.setattr(Answer, "status", 502)
    assert hub.obstacle() == "HTTP status 502"


def test_offline_is_not_even_asked():
    assert hub.obstacle() == "HF_HUB_OFFLINE is set"


def test_a_silent_hub_costs_seconds_and_one_clear_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(BadInput, match=r"model.name=Qwen/Qwen3-0.6B: .*model.path=DIR"):
            HubModel("Qwen/Qwen3-0.6B").load("cpu")
        assert time.monotonic() - began < 5
