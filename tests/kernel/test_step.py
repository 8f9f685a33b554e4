"""All layers in one launch against plain torch, over several steps that grow one row."""

import pytest
import torch
from test_layer import close, layer, widened

from kvlab.core import CacheGeometry
from kvlab.format import by_name
from kvlab.kernel import step_cuda, step_ref
from kvlab.pool import SlabStore

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
]


def made(layers, heads, kv_heads, dim, slots, tokens, dtype, device):
    """A row of `tokens` random tokens in shuffled blocks, the last of which is this step's."""
    format = by_name("bf16" if dtype == torch.bfloat16 else "fp16")
    sealed, fill = divmod(tokens - 1, slots)
    geometry = CacheGeometry(layers, heads, kv_heads, dim, slots)
    stores = []
    for blocks in (sealed, 3):
        store = SlabStore(format.planes(geometry), layers, 4, device)
        store.commit(list(range(blocks)))
        for slab in store.slabs.values():
            slab.view(dtype).normal_()
        stores.append([store.layer(i) for i in range(layers)])
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
    layers = [layer(inner, heads, kv_heads, dim, outer, dtype, device, biased=kv_heads == 4)[::-1]
              for _ in range(4)]
    angle = torch.rand(1, dim, device=device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    for more in range(3):
        past = made(4, heads, kv_heads, dim, slots, tokens + more, dtype, device)
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
