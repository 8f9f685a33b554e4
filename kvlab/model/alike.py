"""Which layers compute exactly what the fused ones do: those that run the same code.

transformers writes out the code of each architecture. Where two compute the same, layer, attention,
MLP, norm and rotary embedding have the same bytecode; where one differs (a residual multiplier, a
layer without rotary positions, another order of norms), it shows there. No name is compared.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache

from torch import nn
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

FAMILIES = ((llama, "Llama"), (mistral, "Mistral"), (qwen2, "Qwen2"), (qwen3, "Qwen3"))


def code_of(f: Callable) -> tuple:
    """What a function does, by its bytecode, the names in it and its plain constants."""
    code = inspect.unwrap(f).__code__
    plain = tuple(x for x in code.co_consts if isinstance(x, (int, float, str, type(None))))
    return code.co_code, code.co_names, plain


@cache
def _known(part: str) -> frozenset[tuple]:
    return frozenset(code_of(getattr(module, name + part).forward) for module, name in FAMILIES)


@cache
def _runs(kind: type, part: str) -> bool:
    return code_of(kind.forward) in _known(part)


@cache
def _rotates(module: str) -> bool:
    rotate = getattr(sys.modules[module], "apply_rotary_pos_emb", None)
    return rotate is not None and code_of(rotate) == code_of(llama.apply_rotary_pos_emb)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether `module` is an RMSNorm as the Llama family has it."""
    return hasattr(module, "variance_epsilon") and _runs(type(module), "RMSNorm")


def is_rotary(module: nn.Module) -> bool:
    """Whether `module` gives rotary angles as in the Llama family."""
    return _runs(type(module), "RotaryEmbedding")


def is_llama_like(layer: nn.Module) -> bool:
    """Whether a decoder layer computes what one of the Llama family does, all parts included."""
    attention, mlp = (getattr(layer, name, None) for name in ("self_attn", "mlp"))
    norms = (getattr(layer, f"{name}_layernorm", None) for name in ("input", "post_attention"))
    return (
        attention is not None and mlp is not None and _runs(type(layer), "DecoderLayer")
        and _runs(type(attention), "Attention") and _runs(type(mlp), "MLP")
        and _rotates(type(attention).__module__)
        and all(norm is not None and is_rms_norm(norm) for norm in norms)
    )
