"""Fewer, larger kernels for one token per row: for every cache alike, undone on leaving.

A decoder layer of the Llama family launches some 50 kernels, and at one token each takes longer
to start than to run. `fused(model)` replaces, while it is open, the layer's own code by
`kernel/layer_*`: norm with q, k and v, head norms with RoPE, output with residual, and the MLP in
two. Cache and attention function are called as the library calls them, so DynamicCache,
StaticCache and PagedCache run through the same code. Longer inputs only get their RMSNorms fused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab.core import KvlabError
from kvlab.kernel import layer_ref
from kvlab.model.alike import is_llama_like, is_rms_norm
from kvlab.model.library import cache_parameter
from kvlab.model.shape import sliding_window

try:
    from kvlab.kernel import layer_triton
except ImportError:  # no Triton on this platform
    layer_triton = None


@contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """Within it `model` decodes through fused layers; gives the number of layers replaced.

    Layers that compute anything else than the Llama family (see `alike`) stay as they are.
    Weights are neither copied nor changed, and prefill runs as before but for the RMSNorms.
    """
    undo: list[nn.Module] = []
    try:
        count = sum(_replace(module, undo) for module in model.modules())
        head = model.get_output_embeddings()
        if head is not None and head.bias is None:
            _put(head, partial(_head, head), undo)
        yield count
    finally:
        for module in undo:
            del module.forward


def _replace(module: nn.Module, undo: list[nn.Module]) -> bool:
    if is_rms_norm(module):
        _put(module, partial(_norm, module), undo)
    elif fusible(module):
        _put(module, partial(_layer, module, cache_parameter(module)), undo)
        return True
    return False


def _put(module: nn.Module, forward, undo: list[nn.Module]) -> None:
    if "forward" not in vars(module):  # somebody else's replacement is left alone
        module.forward = forward
        undo.append(module)


def fusible(layer: nn.Module) -> bool:
    """Whether `layer` computes what a layer of the Llama family does: RMSNorms, gated SiLU, no odd
    biases."""
    if not is_llama_like(layer):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    parts = [getattr(attention, f"{n}_proj", None) for n in "qkvo"]
    parts += [getattr(mlp, f"{n}_proj", None) for n in ("gate", "up", "down")]
    if not all(type(part) is nn.Linear for part in parts):
        return False
    q, k, v, *rest = (part.bias is None for part in parts)
    silu = getattr(mlp.act_fn, "__class__", type).__name__ in ("SiLU", "SiLUActivation")
    return silu and q == k == v and all(rest)


def kernels(x: Tensor):
    """The module that computes rows `x`: Triton's where it is on CUDA and takes them."""
    usable = layer_triton is not None and x.is_cuda and layer_triton.takes(x)
    return layer_triton if usable else layer_ref


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _head(head: nn.Linear, x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    if len(rows) > 16 or kernels(rows) is layer_ref:
        return F.linear(x, head.weight)
    return kernels(rows).norm_linear(rows, None, 0.0, (head.weight,)).view(*x.shape[:-1], -1)


def _layer(layer: nn.Module, parameter: str, hidden_states: Tensor, *args, **given) -> Tensor:
    """The forward of a decoder layer, [B, 1, K] -> [B, 1, K]; longer inputs go the usual way.

    parameter: which argument holds the cache; `KvlabError` where one should come and does not.
    """
    if hidden_states.shape[1] != 1 or args:
        return type(layer).forward(layer, hidden_states, *args, **given)
    cache, due = given.pop(parameter, None), given.pop("use_cache", None)
    stray = [name for name, value in given.items() if isinstance(value, Cache)]
    if stray or (due and cache is None):
        raise KvlabError(f"{type(layer).__name__} should get its cache as {parameter!r} and got "
                         f"{f'one as {stray[0]!r}' if stray else 'none'}")
    x = hidden_states[:, 0].contiguous()
    ops, mlp, norm = kernels(x), layer.mlp, layer.post_attention_layernorm
    angles = given.pop("position_embeddings")
    mixed = _attention(layer, ops, x, angles, cache, given.pop("attention_mask", None), given)
    x = ops.linear_add(mixed, layer.self_attn.o_proj.weight, x)
    inner = ops.gated_linear(
        x, norm.weight, norm.variance_epsilon, mlp.gate_proj.weight, mlp.up_proj.weight
    )
    return ops.linear_add(inner, mlp.down_proj.weight, x)[:, None]


def _attention(layer, ops, x: Tensor, angles, cache, mask, kwargs) -> Tensor:
    """[B, K] -> what the output projection takes, [B, Hq * D]."""
    a, norm = layer.self_attn, layer.input_layernorm
    linears = (a.q_proj, a.k_proj, a.v_proj)
    biases = None if a.q_proj.bias is None else tuple(m.bias for m in linears)
    qkv = ops.norm_linear(
        x, norm.weight, norm.variance_epsilon, tuple(m.weight for m in linears), biases
    )
    heads, kv_heads = (m.weight.shape[0] // a.head_dim for m in linears[:2])
    gains = [getattr(getattr(a, name, None), "weight", None) for name in ("q_norm", "k_norm")]
    eps = getattr(getattr(a, "q_norm", None), "variance_epsilon", 0.0)
    cos, sin = (t[:, 0].expand(len(x), -1) for t in angles)
    q, k, v = (t[:, :, None] for t in ops.rotate(qkv, heads, kv_heads, *gains, eps, cos, sin))
    if cache is not None:
        k, v = cache.update(k, v, a.layer_idx)
    plain = sys.modules[type(a).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(a.config._attn_implementation, plain)
    out, _ = attend(a, q, k, v, mask, dropout=0.0, scaling=a.scaling,
                    sliding_window=sliding_window(a), **kwargs)
    return out.reshape(len(x), -1)
