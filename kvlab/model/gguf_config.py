"""The configuration of a GGUF file in transformers' words, and refusals of what it cannot say.

The library's own reading of the four architectures forgets scaled rotary frequencies and the head
width of Qwen3; a model that computes something else than its file says is worse than none. So the
configuration is written here, and what is not understood is refused.
"""

from __future__ import annotations

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from kvlab.model.gguf_header import Header, blocks

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# Keys that change what a layer computes and that these four architectures of transformers lack.
FOREIGN = (
    "expert_count", "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias",
    "logit_scale", "residual_scale", "embedding_scale", "attn_logit_softcapping",
    "final_logit_softcapping", "use_parallel_residual",
)
LAYER = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up",
    "ffn_down",
)
OUTSIDE = ("token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight")
TOKENIZERS = ("gpt2", "llama")  # byte-level and sentencepiece BPE
ROPE_KEYS = {"", "type", "factor", "original_context_length", "finetuned"}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # of every Llama 3.1, 3.2 and 3.3


def check_architecture(header: Header) -> None:
    """Raises `BadInput` for a file that no class of transformers here computes as it should."""
    kind = header.architecture
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise header.refused(f"architecture {kind!r} is not supported; known: {known}")
    if int(header.metadata.get("split.count", 1) or 1) > 1:
        raise header.refused("is one of several parts; join them with llama-gguf-split --merge")
    for key in FOREIGN:
        if header.get(key):
            raise header.refused(f"{kind}.{key}={header.get(key)} is not supported")
    norms = ("attn_q_norm", "attn_k_norm") if kind == "qwen3" else ()
    known = {f"blk.{name}.weight" for name in LAYER + norms} | set(OUTSIDE)
    known |= {f"blk.{name}.bias" for name in LAYER if name.startswith("attn_")}
    unknown = sorted(set(blocks(header)) - known)
    if unknown:
        raise header.refused(f"tensors {unknown[0]} are unknown in architecture {kind!r}")
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind not in TOKENIZERS:
        raise header.refused(f"its tokenizer {kind!r} is not supported; known: gpt2, llama")
    if "token_embd.weight" not in header.tensors:
        raise header.refused("holds no token_embd.weight; a language model is wanted")


def config_of(header: Header) -> PreTrainedConfig:
    """The configuration that transformers would have for the file's model.

    Raises `BadInput` for what is missing, or what differs from layer to layer.
    """
    biases = {name for name in blocks(header) if name.endswith(".bias")}
    kind = header.architecture
    window = header.get("attention.sliding_window")
    if kind in ("llama", "mistral"):  # files of Mistral models say llama
        kind = "mistral" if window else "llama"
    elif window:
        raise header.refused(f"{kind}.attention.sliding_window={window} is not supported")
    head_dim = _head_dim(header)
    config = AutoConfig.for_model(
        kind,
        vocab_size=header.tensors["token_embd.weight"].shape[0],
        hidden_size=_whole(header, "embedding_length"),
        intermediate_size=_whole(header, "feed_forward_length"),
        num_hidden_layers=_whole(header, "block_count"),
        num_attention_heads=_whole(header, "attention.head_count"),
        num_key_value_heads=_whole(header, "attention.head_count_kv"),
        head_dim=head_dim,
        max_position_embeddings=_whole(header, "context_length"),
        rms_norm_eps=float(header.get("attention.layer_norm_rms_epsilon", 1e-5)),
        rope_parameters=_rope(header, head_dim),
        tie_word_embeddings="output.weight" not in header.tensors,
        **{f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id")
           for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))},
    )
    _settle_biases(header, config, biases)
    _check_shapes(header, config)
    if kind == "mistral":
        config.sliding_window = int(window)
    return config


def _settle_biases(header: Header, config: PreTrainedConfig, biases: set[str]) -> None:
    """Llama and Qwen3 may have biases on all four projections, Qwen2 has them on three."""
    inner = {f"blk.attn_{x}.bias" for x in "qkv"}
    wanted = inner if config.model_type == "qwen2" else inner | {"blk.attn_output.bias"}
    if biases and config.model_type in ("llama", "qwen3"):
        config.attention_bias = True
    elif config.model_type == "mistral":
        wanted = set()
    elif config.model_type != "qwen2":
        return
    if biases != wanted:
        raise header.refused(f"biases {sorted(biases ^ wanted)[0]} do not fit the architecture")


def _check_shapes(header: Header, config: PreTrainedConfig) -> None:
    """Projections are as wide as the metadata says; some versions of transformers do not look."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    wanted = {
        "attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width),
        "attn_output": (width, queries), "ffn_gate": (inner, width), "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    for name, tensor in header.tensors.items():
        first, _, rest = name.partition(".")
        shape = wanted.get(rest.partition(".")[2].removesuffix(".weight"))
        if first == "blk" and shape not in (None, tensor.shape):
            raise header.refused(f"{name} is {list(tensor.shape)}, its metadata say {list(shape)}")


def _whole(header: Header, key: str) -> int:
    value = header.get(key)
    if value is None and key == "attention.head_count_kv":
        return _whole(header, "attention.head_count")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        told = "is missing" if value is None else f"is {str(value)[:40]}, one number is wanted"
        raise header.refused(f"{header.architecture}.{key} {told}")
    return value


def _head_dim(header: Header) -> int:
    plain = _whole(header, "embedding_length") // _whole(header, "attention.head_count")
    width = int(header.get("attention.key_length", header.get("rope.dimension_count", plain)))
    others = {int(header.get(key, width)) for key in
              ("attention.value_length", "rope.dimension_count")}
    if others != {width}:
        raise header.refused(f"keys have {width} channels, values or rotary pairs span "
                             f"{max(others - {width})}; equal widths are supported")
    return width


def _rope(header: Header, head_dim: int) -> dict:
    """Rotary parameters. Scaling stands in the metadata or, for Llama 3, as a tensor of divisors
    of the frequencies, which names a factor only together with what all those models share.
    """
    theta = float(header.get("rope.freq_base", 10000.0))
    kind = header.get("rope.scaling.type", "none")
    plain = {"rope_type": "default", "rope_theta": theta}
    if "rope_freqs.weight" in header.tensors:
        return _llama3(header, theta, head_dim)
    if kind == "none":
        return plain
    more = {key.partition("rope.scaling.")[2] for key in header.metadata} - ROPE_KEYS
    if kind not in ("linear", "yarn") or more:
        told = f"rotary scaling {kind!r} {'with ' + min(more) + ' ' if more else ''}"
        raise header.refused(f"{told}is not supported; known: none, linear, yarn, Llama 3.1's")
    scaled = plain | {"rope_type": kind, "factor": float(header.get("rope.scaling.factor", 1.0))}
    if kind == "yarn":
        length = _whole(header, "rope.scaling.original_context_length")
        scaled["original_max_position_embeddings"] = length
    return scaled


def _llama3(header: Header, theta: float, head_dim: int) -> dict:
    tensor = header.tensors["rope_freqs.weight"]
    if tensor.type != 0 or tensor.shape != (head_dim // 2,):
        raise header.refused("rope_freqs.weight is not one fp32 number for each rotary pair")
    divisors = np.memmap(header.path, np.dtype("<f4"), "r", tensor.start, tensor.shape)
    factor = round(float(divisors.max()), 3)  # 8 or 32, and an fp32 division away from it
    if not np.allclose(divisors, _llama3_divisors(factor, theta, head_dim), rtol=1e-3):
        raise header.refused("rope_freqs.weight is no scaling of Llama 3.1, the one that is known")
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3}


def _llama3_divisors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """[D / 2]: frequency of each rotary pair over the scaled one (Llama 3.1's `apply_scaling`)."""
    turns = LLAMA3["original_max_position_embeddings"] / (2 * np.pi)
    turns = turns * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
