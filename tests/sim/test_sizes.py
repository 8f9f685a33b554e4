"""Bytes by formula are those of the plane layout; FLOPs by formula are a plain sum."""

import pytest

from kvlab.core import BadInput
from kvlab.sim.sizes import (
    FORMATS,
    SHAPES,
    bits_per_element,
    blocks_for,
    shape_by_name,
    token_bytes,
)


def plane_bits(name: str, slots: int, width: int) -> float:
    """Bits per element from the planes written out: data [S, D], scale and zero fp16."""
    dense = {"fp32": 32, "fp16": 16, "bf16": 16}
    if name in dense:
        return dense[name]
    if name == "fp8":
        return (8 * slots * width + 16 * slots) / (slots * width)
    if name == "fp8c":
        keys = 16 * (2 * width if slots >= 16 else slots)  # a scale and a middle for a channel
        return (8 * slots * width + (keys + 16 * slots) / 2) / (slots * width)
    pairs = {"k8v4": (8, 4), "k4v2": (4, 2), "k3v2": (3, 2)}
    key, value = pairs.get(name.rstrip("g"), (int(name.rstrip("g")[-1]),) * 2)
    per_channel = slots >= 16
    if name.endswith("g"):  # scale and zero of 8 bits for 32 elements, a unit, means of channels
        scales = 16 * width * max(1, slots // 32) + 16 * width if per_channel else slots * width / 2
        scales += slots * width / 2 + 2 * 16
        return (key + value) / 2 + scales / (2 * slots * width)
    total = 0
    for bits, shared in ((key, width if per_channel else slots), (value, slots)):
        total += bits * slots * width + 16 * shared * (1 if bits == 8 else 2)
    return total / (2 * slots * width)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("slots", [8, 16, 64])
def test_bits_follow_the_planes(name, slots):
    assert bits_per_element(name, slots, 128) == pytest.approx(plane_bits(name, slots, 128))


def test_known_sizes():
    llama = SHAPES["llama-3.1-8b"]
    assert token_bytes("bf16", llama) == 131_072
    assert bits_per_element("int4") == 4.375 and bits_per_element("k4v2") == 3.375
    assert blocks_for(2**30, 512, token_bytes("bf16", llama)) == 16


def test_flops_are_the_sum_over_tokens():
    shape = SHAPES["qwen3-0.6b"]
    per_pair = 4 * shape.layers * shape.query_heads * shape.head_dim
    plain = sum(2 * shape.parameters + per_pair * (i + 1) for i in range(100))
    assert shape.prefill_flops(100) == pytest.approx(plain)


def test_unknown_names_list_the_known():
    with pytest.raises(BadInput, match="known: fp32"):
        bits_per_element("int5")
    with pytest.raises(BadInput, match="llama-3.1-8b"):
        shape_by_name("llama")


def test_sizes_agree_with_the_formats_themselves():
    """Where torch is there: the formulas are those of `kvlab.format`."""
    pytest.importorskip("torch")
    formats = pytest.importorskip("kvlab.format")
    from kvlab.core import CacheGeometry

    geometry = CacheGeometry(layers=2, query_heads=4, kv_heads=2, head_dim=128, block_size=64)
    for name in FORMATS:
        found = formats.by_name(name).block_bytes(geometry)
        assert found == pytest.approx(bits_per_element(name) * geometry.elements_per_block / 8)
