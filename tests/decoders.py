"""Tiny random decoders of many architectures: what a library model may ask of a cache."""

from __future__ import annotations

import copy
from functools import cache
from importlib import import_module

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
       "moe_intermediate_size": 32}  # fmt: skip
LLAMA4 = {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 14,
          "no_rope_layers": [1, 1, 0]}  # fmt: skip
# name -> architecture, what differs from SHAPE
DECODERS: dict[str, tuple[str, dict]] = {
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", {"sliding_window": 12, "attn_logit_softcapping": 2.0,
                          "query_pre_attn_scalar": 24, "head_dim": 24, "layer_types": MIXED}),
    "gemma3": ("Gemma3Text", {"sliding_window": 12, "head_dim": 24, "layer_types": MIXED,
                              "query_pre_attn_scalar": 24}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3_window": ("Phi3", {"sliding_window": 12}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 12, "layer_types": MIXED}),
    "granite": ("Granite", {"attention_multiplier": 0.4, "residual_multiplier": 0.5,
                            "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {"sliding_window": 12, "layer_types": MIXED}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.5}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.25, "partial_rotary_factor": 0.25}),
    "starcoder2": ("Starcoder2", {"sliding_window": 12}),
    "qwen2_moe": ("Qwen2Moe", {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 24}),
    "mixtral": ("Mixtral", {"sliding_window": None}),
    "gpt_oss": ("GptOss", {"sliding_window": 12, "head_dim": 16, "layer_types": MIXED}),
    "llama4": ("Llama4Text", LLAMA4),
    "glm4": ("Glm4", {"partial_rotary_factor": 0.5, "head_dim": 16}),
    "ernie4_5": ("Ernie4_5", {}),
    "exaone4": ("Exaone4", {"sliding_window": 12, "layer_types": MIXED}),
    "seed_oss": ("SeedOss", {}),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 16}),
    "nemotron": ("Nemotron", {"partial_rotary_factor": 0.5}),
    "deepseek_v3": ("DeepseekV3", {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 12, "num_key_value_heads": 4, "head_dim": 8}),
}  # fmt: skip
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip


@cache
def _built(name: str):
    torch, transformers = import_module("torch"), import_module("transformers")
    kind, changes = DECODERS[name]
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy(SHAPE | MOE | changes))
    kind = kind.removesuffix("Text")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        for parameter in model.parameters():  # what a model leaves empty has a value, too
            if not bool(torch.isfinite(parameter).all()) or parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.5, 0.2)
    return model.float().eval().requires_grad_(False)


def make_decoder(name: str):
    """A model of its own in fp32, with the same weights at each call, under eager attention."""
    model = copy.deepcopy(_built(name))
    model.set_attn_implementation("eager")
    return model
