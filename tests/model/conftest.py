"""GGUF files of tiny models and a cache folder of one's own; skipped where the extra is missing."""

from __future__ import annotations

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder of this test."""
    monkeypatch.setenv("KVLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def written(tmp_path, tiny_model, cache):
    """`written(architecture, quantize, **changes)`: a file and the model it was written from."""
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason=f"the extra `gguf` is not installed: {package}")
    import torch
    from gguf_files import write_gguf

    def make(
        architecture="Llama", quantize="F32", change=None, extra=None, pre="smollm", **changes
    ):
        model = tiny_model(architecture, **{"vocab_size": 512} | changes)
        for weight in model.parameters():  # norms of 1 and biases of 0 hide mistakes
            if weight.dim() == 1:
                weight.data += 0.1 * torch.randn(weight.shape)
        path = tmp_path / f"tiny-{architecture}.gguf"
        return write_gguf(path, model, quantize, change=change, extra=extra, pre=pre), model

    return make
