"""What comes nearest elsewhere, and what it cannot do: vLLM's flags and transformers' arguments.

Read in their sources (vLLM: `CacheDType` in `vllm/config/cache.py`; transformers 5.24:
`cache_utils.py`), not run.
"""

from __future__ import annotations

_HQQ = ("rounds the whole cache anew whenever its residual is full, and dequantizes all of it at "
        "every step")  # fmt: skip


def _quantized(backend: str, bits: int) -> str:
    config = f'{{"backend": "{backend}", "nbits": {bits}}}'
    return f'cache_implementation="quantized", cache_config={config}: {_HQQ}'


# format -> (vLLM, transformers)
FORMATS = {
    "bf16": ("--kv-cache-dtype auto", "DynamicCache(), the default"),
    "fp8": ("--kv-cache-dtype fp8: one scale a tensor",
            'cache_implementation="quantized", cache_config={"backend": "fp8"} (from 5.24): one '
            "scale a tensor"),
    "int8": ("--kv-cache-dtype int8_per_token_head: no scale for a channel of keys",
             _quantized("hqq", 8)),
    "int4": ("--kv-cache-dtype int4_per_token_head: no scale for a channel of keys",
             _quantized("quanto", 4)),
    "int3": ("--kv-cache-dtype turboquant_3bit_nc: another method", _quantized("hqq", 3)),
    "int2": ("none", _quantized("quanto", 2)),
    "k4v2": ("--kv-cache-dtype turboquant_3bit_nc: keys and values alike",
             "none: keys and values have the same bits"),
    "k3v2": ("none: turboquant_k3v4_nc gives values 4 bits",
             "none: keys and values have the same bits"),
}  # fmt: skip

# what else a composition does -> (vLLM, transformers)
DEEDS = {
    "host": ("--kv-offloading-size GIB: holds what requests left behind; a request that runs has "
             "to fit on the device",
             'cache_implementation="offloaded": moves every layer whole, there and back, at every '
             "step; not with a quantized cache"),
    "quest": ("none", "none"),
    "prefix": ("--enable-prefix-caching: LRU alone, and no other order",
               "ContinuousBatchingConfig(allow_block_sharing=True): while requests run; not with "
               "a quantized cache"),
    "window": ("none for a model trained without a window: no sinks, so what is left reads badly",
               "none: SinkCache is gone"),
}  # fmt: skip


def nearest(format: str, deed: str | None) -> tuple[str, str]:
    """What vLLM and transformers have for a format and for what is done beside it."""
    plain = format.removesuffix("g").removesuffix("c")
    vllm, ours = FORMATS.get(plain, ("none", "none"))
    if format != plain and not vllm.startswith("none"):
        vllm += "; no scales for groups" if format.endswith("g") else "; no middles of channels"
    if deed is None:
        return vllm, ours
    beside = DEEDS[deed]
    if plain != "bf16" and not beside[1].startswith("none"):
        ours = f"none of both at once. {ours}"
    return _both(vllm, beside[0]), _both(ours, beside[1])


def _both(format: str, deed: str) -> str:
    """A format's flag and that of what is done beside it; without the second there is no way."""
    if deed.startswith("none"):
        return deed
    return f"{format}. And {deed}"
