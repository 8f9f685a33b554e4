"""Fewer, larger kernels for one token per row: for every cache alike, undone on leaving.

A decoder layer of the Llama family launches some 50 kernels, and at one token each takes longer
to start than to run. `fused(model)` replaces, while it is open, the layer's own code by `chain` of
`kernel/layer_*`: from one attention to the next, in one launch or a few. Cache and attention
function are called as the library calls them, so DynamicCache, StaticCache and PagedCache run
through the same code; one row over plain blocks goes through all layers in one launch
(`kernel/step_cuda`). Short chunks of a prompt wait for the host as well and go the same way; of
longer inputs only the RMSNorms are fused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab.core import KvlabError
from kvlab.kernel import layer_cuda, layer_ref, step_cuda
from kvlab.model.alike import is_llama_like, is_rms_norm, is_rotary
from kvlab.model.library import cache_parameter
from kvlab.model.shape import sliding_window

try:
    from kvlab.kernel import angles_triton, layer_blas_triton, layer_triton
except ImportError:  # no Triton on this platform
    angles_triton = layer_blas_triton = layer_triton = None


MOST_ROWS = 1024  # of a chunk: more keep the device busy for longer than the host takes to launch
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that no length changes


def fused(model: nn.Module) -> AbstractContextManager[int]:
    """Within it `model` decodes through fused layers; gives the number of layers replaced.

    Layers that compute anything else than the Llama family (see `alike`) stay as they are.
    Weights are neither copied nor changed, and chunks of more than `MOST_ROWS` tokens run as before
    but for the RMSNorms.
    """
    return Fusing(model).on()


class Fusing:
    """Which parts of `model` are replaced by what, found out once: `on` may be entered again and
    again, and looks anew only where a module or a parameter is another object than it was."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._places: list[tuple[dict, str, object]] = []  # who holds which part under which name
        self._ahead = Ahead()
        self._layers: list[nn.Module] = []
        self._parts: list[tuple[nn.Module, Callable]] = []

    @contextmanager
    def on(self) -> Iterator[int]:
        """Within it the model runs fused; gives the number of layers replaced."""
        if not self._places or any(held.get(name) is not x for held, name, x in self._places):
            self._find()
        undo: list[nn.Module] = []
        try:
            for module, forward in self._parts:
                if "forward" not in vars(module):  # somebody else's replacement is left alone
                    module.forward = forward
                    undo.append(module)
            yield len(self._layers)
        finally:
            self._ahead.finish(None)
            for module in undo:
                del module.forward

    def _find(self) -> None:
        model, modules = self.model, list(self.model.modules())
        held = [part for m in modules for part in (m._modules, m._parameters)]
        self._places = [(part, name, x) for part in held for name, x in part.items()]
        self._layers = layers = [module for module in modules if fusible(module)]
        weights = [(_start(layer), _finish(layer)) for layer in layers]
        parts = [(module, partial(_norm, module)) for module in modules if is_rms_norm(module)]
        parts += [(layer, FusedLayer(number, layers, weights, self._ahead))
                  for number, layer in enumerate(layers)]  # fmt: skip
        rotary = getattr(model.get_decoder(), "rotary_emb", None)
        if getattr(rotary, "rope_type", None) in STATIC_ROPE and is_rotary(rotary):
            parts.append((rotary, partial(_angles, rotary)))
        head = model.get_output_embeddings()
        if head is not None and head.bias is None:
            parts.append((head, partial(_head, head)))
        self._parts = parts


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
    """The module that computes rows `x`, the first of those on CUDA that take them."""
    if layer_triton is None or not x.is_cuda:
        return layer_ref
    return next((ops for ops in (layer_triton, layer_blas_triton) if ops.takes(x)), layer_ref)


def chain_for(x: Tensor, finish: layer_ref.Finish, start: layer_ref.Start):
    """`chain` for rows `x` of a layer with these weights: in one launch where that runs."""
    if layer_cuda.takes(x, finish, start):
        return partial(layer_cuda.chain, of=layer_cuda.sizes(x, finish, start))
    return kernels(x).chain


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _angles(rotary: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    if angles_triton is None or not x.is_cuda or position_ids.shape[1:] != (1,):
        return type(rotary).forward(rotary, x, position_ids)
    positions = position_ids.contiguous()
    return angles_triton.angles(positions, rotary.inv_freq, rotary.attention_scaling, x.dtype)


def _head(head: nn.Linear, x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    if kernels(rows) is not layer_triton:
        return F.linear(x, head.weight)
    return layer_triton.norm_linear(rows, None, 0.0, (head.weight,)).view(*x.shape[:-1], -1)


class Ahead:
    """What a fused layer computed for those behind it: the next one's q, k and v, for just this
    input, or all that they would."""

    def __init__(self):
        self._made: tuple | None = None
        self._done: Tensor | None = None

    def put(self, hidden: Tensor, angles, heads) -> None:
        self._made, self._done = (hidden, angles, heads), None

    def take(self, hidden: Tensor, angles):
        """The heads, or None where they were not made, or for other tensors."""
        made, self._made = self._made, None
        return made[2] if made and made[0] is hidden and made[1] is angles else None

    def finish(self, hidden: Tensor | None) -> None:
        """`hidden` has been through all layers; None: nothing has."""
        self._made, self._done = None, hidden

    def finished(self, hidden: Tensor) -> bool:
        return hidden is self._done


class FusedLayer:
    """The forward of decoder layer `number`, [B, T, K] -> [B, T, K]; long inputs go as usual.

    Behind its attention it goes on to the next layer's: q, k, v wait in `ahead` until that layer is
    called with the very tensors. The first one computes all of them where one launch can.
    """

    def __init__(self, number: int, layers: list[nn.Module], weights: list, ahead: Ahead):
        self.number, self.layer, self.layers = number, layers[number], layers
        self.weights, self.ahead = weights, ahead
        self.parameter = cache_parameter(self.layer)  # which argument holds the cache
        self.start, self.finish = weights[number]
        self.next = weights[number + 1][0] if number + 1 < len(layers) else None

    def __call__(self, hidden_states: Tensor, *args, **given) -> Tensor:
        """Raises `KvlabError` where a cache should come and does not."""
        layer, (batch, tokens, _) = self.layer, hidden_states.shape
        if self.ahead.finished(hidden_states):
            return hidden_states
        if args or (tokens > 1 and batch * tokens > MOST_ROWS):
            return type(layer).forward(layer, hidden_states, *args, **given)
        cache, due = given.pop(self.parameter, None), given.pop("use_cache", None)
        stray = [name for name, value in given.items() if isinstance(value, Cache)]
        if stray or (due and cache is None):
            raise KvlabError(
                f"{type(layer).__name__} should get its cache as {self.parameter!r} and got "
                f"{f'one as {stray[0]!r}' if stray else 'none'}")
        x, angles = hidden_states.flatten(0, 1).contiguous(), given.pop("position_embeddings")
        cos, sin = (t.expand(batch, -1, -1).flatten(0, 1) for t in angles)
        first = self.number == 0 and tokens == 1
        if first and (out := self._all(x, cos, sin, cache)) is not None:
            self.ahead.finish(out)
            return out
        chain, heads = chain_for(x, self.finish, self.start), self.ahead.take(hidden_states, angles)
        if heads is None:
            _, heads = chain(x, None, None, self.start, cos, sin)
        heads = [t.unflatten(0, (batch, tokens)).transpose(1, 2) for t in heads]
        mixed = _attention(layer, heads, cache, given.pop("attention_mask", None), given)
        x, heads = chain(x, mixed, self.finish, self.next, cos, sin)
        out = x.unflatten(0, (batch, tokens))
        self.ahead.put(out, angles, heads)
        return out

    def _all(self, x: Tensor, cos: Tensor, sin: Tensor, cache) -> Tensor | None:
        """All layers at once, [1, 1, K], where cache and device allow that."""
        scales = {layer.self_attn.scaling for layer in self.layers}
        windows = {sliding_window(layer.self_attn) for layer in self.layers}
        past = getattr(cache, "past", None)
        if past is None or len(scales) > 1 or windows != {None}:
            return None
        past = past(*scales)
        if past is None or not step_cuda.takes(x, self.weights, past):
            return None
        out = step_cuda.decode_layers(x, self.weights, cos, sin, past)
        cache.forward.served += len(self.layers)
        return out[:, None]


def _start(layer: nn.Module) -> layer_ref.Start:
    a, norm = layer.self_attn, layer.input_layernorm
    linears = (a.q_proj, a.k_proj, a.v_proj)
    gains = [getattr(getattr(a, name, None), "weight", None) for name in ("q_norm", "k_norm")]
    return layer_ref.Start(
        norm.weight, norm.variance_epsilon, tuple(m.weight for m in linears),
        None if a.q_proj.bias is None else tuple(m.bias for m in linears),
        *(m.weight.shape[0] // a.head_dim for m in linears[:2]), *gains,
        getattr(getattr(a, "q_norm", None), "variance_epsilon", 0.0),
    )


def _finish(layer: nn.Module) -> layer_ref.Finish:
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    return layer_ref.Finish(
        layer.self_attn.o_proj.weight, norm.weight, norm.variance_epsilon, mlp.gate_proj.weight,
        mlp.up_proj.weight, mlp.down_proj.weight,
    )


def _attention(layer: nn.Module, heads, cache, mask, kwargs) -> Tensor:
    """q [B, Hq, T, D], k and v [B, H, T, D] -> what the output projection takes [B * T, Hq * D]."""
    a, (q, k, v) = layer.self_attn, heads
    if cache is not None:
        k, v = cache.update(k, v, a.layer_idx)
    plain = sys.modules[type(a).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(a.config._attn_implementation, plain)
    out, _ = attend(a, q, k, v, mask, dropout=0.0, scaling=a.scaling,
                    sliding_window=sliding_window(a), **kwargs)
    return out.flatten(2).flatten(0, 1)
