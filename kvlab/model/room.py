"""What is free on a device, and how a chunk of prefill and a cache share it."""

from __future__ import annotations

import torch

from kvlab.cache import CacheSpec, PagedCache
from kvlab.core import BadInput
from kvlab.model.portrait import model_geometry
from kvlab.offload.memory import free_bytes as host_free_bytes

SMALLEST, LARGEST = 512, 16384  # tokens of a chunk: what `adaptive` chooses between
ASSUMED = 2048  # tokens of a chunk that an adaptive budget leaves room for
SPARE = 8  # one part in so many stays free: the allocator's fragments, libraries, captured graphs


def free_bytes(device: torch.device) -> int:
    """What this process may still allocate on `device`, under the cap it was given, if any."""
    if device.type != "cuda":
        return host_free_bytes()
    free = torch.cuda.mem_get_info(device)[0]
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limit = torch.cuda.get_per_process_memory_fraction(device)
    capped = limit * torch.cuda.get_device_properties(device).total_memory
    return min(free + reserve, int(capped) - torch.cuda.memory_allocated(device))


def adaptive_chunk(model, cache: PagedCache) -> int:
    """The largest power of two that fits in three quarters of the memory that is free now.

    With its activations and, where none leave for them, its blocks. The last quarter is for the
    workspace and the allocator's fragments. On the CPU, where a larger chunk wins nothing, it is
    the smallest.
    """
    device, spec = cache.device, cache.spec
    if device.type != "cuda":
        return SMALLEST
    stored = spec.format.block_bytes(cache.geometry) // spec.block_size
    each = activation_bytes(model.config) + stored
    tokens, size = free_bytes(device) * 3 // 4 // each, SMALLEST
    while size * 2 <= min(tokens, LARGEST):
        size *= 2
    return size


def adaptive_budget(model, spec: CacheSpec) -> int:
    """Bytes of sealed blocks for `cache.budget_bytes=adaptive`: what is free now, less the rest.

    The rest: an eighth; the workspace, and as much again for what comes from host memory; and the
    activations of a chunk of 2,048 tokens (an adaptive chunk takes what is left later, at least
    512). Decided once, when the cache is made. Digests of retrieval and entries of summaries come
    on top and grow with the tokens seen; the eighth has to carry them. Raises `BadInput` where no
    block fits.
    """
    free, config = free_bytes(model.device), model.config.get_text_config(decoder=True)
    g = model_geometry(model, spec)
    token = max(shape.elements for shape in g.shapes) * model.dtype.itemsize
    workspace = spec.workspace_tokens * token * (2 if spec.offload.keeps else 1)
    budget = free - free // SPARE - workspace - ASSUMED * activation_bytes(config)
    block = spec.format.block_bytes(g)
    if budget < block:
        raise BadInput("cache.budget_bytes", "adaptive", f"finds no room: {free} bytes are free,"
                       f" and beside workspace and chunk not one block of {block} bytes fits")
    return budget


def activation_bytes(config) -> int:
    """Bytes that one token of a chunk needs at the widest point of a layer, in bf16 on CUDA.

    Counted from the code that runs. All along there are the embedded prompt, which the model keeps,
    the layer's input and the same normed; the position, cos and sin. Attention is widest where a
    piece is folded into the running sum (`source/sum.py`): queries, keys, values, the place of the
    result (rows with padding have one; a single row does without), the piece's result, the sum in
    fp32, and the lse of both. The MLP is widest where its two inner products are multiplied, with a
    residual of its own. Chunks of at most `fuse.MOST_ROWS` rows go another way and are short.
    Rotating the queries takes less than attention. What does not grow with the chunk is not in
    here: see `standing_bytes`.
    """
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    wide, narrow = heads * dim, kv_heads * dim
    along = 2 * 3 * config.hidden_size + 8 + 2 * 2 * dim
    attention = 2 * (3 * wide + 2 * narrow) + 4 * wide + 2 * 4 * heads
    mlp = 2 * (config.hidden_size + 3 * inner_width(config))
    return along + max(attention, mlp)


def captured_bytes(config, rows: int, tokens: int) -> int:
    """Bytes that a captured chunk of so many tokens in each row holds beside the cache for as long
    as it may be replayed: its activations have memory of their own, which no other chunk shares.
    Tables and buffers of the past are the workspace's.
    """
    return rows * tokens * (activation_bytes(config.get_text_config(decoder=True)) + 2 * 8)


def inner_width(config) -> int:
    """Elements of the widest inner product of an MLP for one token: of all its experts together."""
    plain = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    experts = getattr(config, "num_experts_per_tok", None) or 0
    return max(plain, experts * (getattr(config, "moe_intermediate_size", None) or plain))


def standing_bytes(model, device: torch.device) -> int:
    """Bytes on `device` besides the weights, asked before there is a cache; 0 without CUDA.

    The prompt's ids, and what libraries keep once they have run: cuBLAS 32 MiB for each stream that
    has multiplied matrices (on Hopper), so three where steps were captured. Anything else in here
    was left behind by what ran before.
    """
    if device.type != "cuda":
        return 0
    return torch.cuda.memory_allocated(device) - weight_bytes(model)


def weight_bytes(model) -> int:
    """Bytes of the parameters; what layers share counts once."""
    return sum(p.nbytes for p in model.parameters())
