"""Random models so small that a test may have several."""

from __future__ import annotations

from importlib import import_module


def make_tiny_model(architecture: str = "Qwen3", head_dim: int = 32, seed: int = 0, **changes):
    torch, transformers = import_module("torch"), import_module("transformers")
    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 1 << 16,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # wide enough that logits differ and greedy tokens are no ties
    }
    if architecture == "Mistral":
        shape["sliding_window"] = None
    config = getattr(transformers, f"{architecture}Config")(**shape | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    return model.eval().requires_grad_(False)
