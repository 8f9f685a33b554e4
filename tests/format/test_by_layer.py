"""A format for each layer: the list as it is written, and what it counts."""

from __future__ import annotations

import pytest

from kvlab.core import BadInput, CacheGeometry
from kvlab.format import CODECS, ByLayer, KVFormat, by_name, paired
from kvlab.format.names import key_codec, value_codec

G = CacheGeometry(5, 4, 2, 64, 64)


def names(layers, count=5, **more):
    return [format.name for format in ByLayer(layers, **more).each(count)]


def test_runs_and_what_is_left():
    assert names(["int8*2", "int4*"]) == ["int8"] * 2 + ["int4"] * 3
    assert names(["int8", "int4*", "fp8*2"], 4) == ["int8", "int4", "fp8", "fp8"]
    assert names(["int8*5", "int4*"]) == ["int8"] * 5
    assert names(["int4g/int2g*4", by_name("bf16")]) == ["int4g/int2g"] * 4 + ["bf16"]


@pytest.mark.parametrize(
    ("layers", "told"),
    [([], "names no format"), (["int8*2"], "names 2 layers and the model has 5"),
     (["int8*6", "int4*"], "names 6 layers"), (["int8*", "int4*"], "says twice"),
     (["int9*5"], "known: .*int8"), (["int4/int9*5"], "no codec 'int9'"), ([3], "is no format"),
     (["by_layer*5"], "list of layers itself"), (["int8*-1"], "is no format")],
)  # fmt: skip
def test_lists_that_say_nothing_are_refused(layers, told):
    with pytest.raises(BadInput, match=told):
        ByLayer(layers).each(5)


def test_bytes_and_groups_are_the_layers_own():
    mixed, parts = ByLayer(["int8*2", "int4", "int8*"]), [by_name(n) for n in ("int8", "int4")]
    assert mixed.groups(G) == [(0, 1, 3, 4), (2,)]
    assert mixed.block_bytes(G) == (4 * parts[0].block_bytes(G) + parts[1].block_bytes(G)) // 5
    assert mixed.token_bits(G) == (4 * parts[0].token_bits(G) + parts[1].token_bits(G)) // 5
    assert by_name("int8").groups(G) == [(0, 1, 2, 3, 4)]
    with pytest.raises(BadInput, match="one for all is wanted"):
        mixed.planes(G)


def test_other_layers_are_another_identity():
    told = {ByLayer(layers).identity for layers in
            (["int8*2", "int4*"], ["int8*3", "int4*"], ["int4*", "int8*2"], ["int8*5"])}
    assert len(told) == 4


def test_sinks_are_those_of_the_names_or_given():
    assert [f.sinks for f in ByLayer(["int4g/bf16", "bf16*"], sinks=4).each(3)] == [4, 0, 0]
    assert [f.sinks for f in ByLayer([by_name("int4", sinks=2), "int8"]).each(2)] == [2, 0]
    assert ByLayer(["int4*"], sinks=3).sinks == 3


@pytest.mark.parametrize("name", CODECS)
def test_each_name_is_a_codec_of_keys_and_of_values(name):
    format = paired(f"{name}/{name}", 4)
    assert isinstance(format, KVFormat) and format.planes(G.part([0]))
    assert key_codec(name).bits == value_codec(name).bits
