"""All layers in one launch against plain torch, over several steps that grow one row."""

import pytest
import torch
from test_layer import close, layer, widened

from kvlab.core import CacheGeometry
from kvlab.format import by_name
from kvlab.kernel import step_cuda, step_ref
from kvlab.kernel.blocks_ref import block_views
from kvlab.pool import SlabStore

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
]


def made(layers, heads, kv_heads, dim, slots, tokens, dtype, device, name=None):
    """A row of `tokens` random tokens in shuffled blocks, the last of which is this step's."""
    dense = by_name("bf16" if dtype == torch.bfloat16 else "fp16")
    format = by_name(name) if name else dense
    sealed, fill = divmod(tokens - 1, slots)
    geometry = CacheGeometry(layers, heads, kv_heads, dim, slots)
    stores = []
    for blocks, codes in ((sealed, format), (3, dense)):
        store = SlabStore(codes.planes(geometry), layers, 4, device)
        store.commit(list(range(blocks)))
        planes = [store.layer(i) for i in range(layers)]
        if codes is dense:
            for slab in store.slabs.values():
                slab.view(dtype).normal_()
        for own in planes if codes is not dense else ():
            past = torch.randn(2, blocks, slots, kv_heads, dim, device=device) + 0.5
            stored = codes.quantize(*past.to(dtype))
            for block in range(blocks):
                for plane, view in block_views(own, block).items():
                    view.copy_(stored[plane][block])
        stores.append(planes)
    table = torch.zeros(1, sealed + 2, dtype=torch.int32, device=device)
    table[0, :sealed] = torch.randperm(sealed, device=device)
    numbers = [torch.tensor([n], dtype=torch.int32, device=device) for n in (sealed, 2, fill + 1)]
    return step_ref.Past(*stores, format, table, *numbers, dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner, heads, kv_heads, dim, outer, slots, tokens", [
    (1024, 16, 8, 128, 3072, 64, 1), (1024, 16, 8, 128, 3072, 64, 1100),
    (2048, 32, 8, 64, 8192, 16, 333), (1024, 16, 4, 64, 1536, 32, 64),
])
def test_all_layers(inner, heads, kv_heads, dim, outer, slots, tokens, dtype, device):
    compare(4, inner, heads, kv_heads, dim, outer, slots, tokens, dtype, device)


@pytest.mark.parametrize("name, slots, dim, tokens, dtype", [
    ("fp8", 128, 128, 1100, torch.bfloat16), ("int8", 64, 128, 1430, torch.bfloat16),
    ("int4", 128, 128, 2400, torch.bfloat16), ("k4v2", 128, 64, 700, torch.float16),
    ("fp8", 64, 64, 30, torch.float16),
])
def test_codes(name, slots, dim, tokens, dtype, device):
    compare(2, 1024, 16, 8 if dim == 128 else 4, dim, 3072, slots, tokens, dtype, device, name)


def compare(count, inner, heads, kv_heads, dim, outer, slots, tokens, dtype, device, name=None):
    layers = [layer(inner, heads, kv_heads, dim, outer, dtype, device, biased=kv_heads == 4)[::-1]
              for _ in range(count)]
    angle = torch.rand(1, dim, device=device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    for more in range(3):
        past = made(count, heads, kv_heads, dim, slots, tokens + more, dtype, device, name)
        x = torch.randn(1, inner, device=device).to(dtype)
        if not step_cuda.takes(x, layers, past):
            pytest.skip("no Hopper, or no cuda-bindings")
        got = step_cuda.decode_layers(x, layers, cos, sin, past)
        stored = [slab.clone() for slab in past.open[0].slabs.values()]
        plain = step_ref.decode_layers(x, layers, cos, sin, past)
        for a, b in zip(stored, past.open[0].slabs.values()):  # the token is where it belongs
            torch.testing.assert_close(a.view(dtype), b.view(dtype), atol=0.1, rtol=0.1)
        wide = [widened(x) for x in layers]
        close(got, step_ref.decode_layers(x.float(), wide, cos.float(), sin.float(), past), plain)
