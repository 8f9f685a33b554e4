"""GGUF files of tiny models, written with the `gguf` package as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

from kvlab.model.load import REFERENCE

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ARCH = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def write_gguf(
    path: Path, model, quantize: str = "F32", *, change=None, extra=None, pre="smollm"
) -> Path:
    """`model` as a GGUF file with as much of the bundled tokenizer as it has ids.

    quantize: type of the projections, embeddings and head; norms and biases stay F32.
    change: called with the writer before anything is written. extra: tensors beside the model's.
    pre: llama.cpp's name of how text is split before merging.
    """
    config = model.config
    arch = ARCH[config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    if change is not None:
        change(writer)
    _metadata(writer, config)
    _tokenizer(writer, config.vocab_size, pre)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data, (stem, _, kind) = tensor.float().numpy(), name.rpartition(".")
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            data = _interleaved(data, config, stem[-6])
        _add(writer, f"{names.get_name(stem)}.{kind}", data, quantize if data.ndim > 1 else "F32")
    for name, data in (extra or {}).items():
        _add(writer, name, data, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, name: str, data: np.ndarray, kind: str) -> None:
    kind = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)


def _interleaved(data: np.ndarray, config, which: str) -> np.ndarray:
    """Llama files keep the two channels of a rotary pair side by side."""
    heads = config.num_attention_heads if which == "q" else config.num_key_value_heads
    split = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
    return split.swapaxes(1, 2).reshape(data.shape)


def _metadata(writer, config) -> None:
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tokenizer(writer, size: int, pre: str) -> None:
    told = json.loads((REFERENCE / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"] | {t["content"]: t["id"] for t in told["added_tokens"]}
    special = {t["content"] for t in told["added_tokens"]}
    spare = 12 * (size < len(vocabulary))  # ids for tokens that some versions always add
    tokens = sorted(vocabulary, key=vocabulary.get)[: size - spare]
    merges = [m.split(" ") if isinstance(m, str) else m for m in told["model"]["merges"]]
    known = set(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(m) for m in merges if {*m, "".join(m)} <= known])
    writer.add_eos_token_id(vocabulary["<|endoftext|>"])
    writer.add_bos_token_id(vocabulary["<|endoftext|>"])
    writer.add_chat_template(TEMPLATE)


def yarn(writer) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)
