"""Every format: what it declares is what it stores, and how far it may be off."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.core import BadInput, CacheGeometry
from kvlab.format import NAMES, Dense, Fp8, Grouped, Int, KVFormat, by_name
from kvlab.format.base import resolve_axis
from kvlab.kernel.quantize_ref import SCALE_FLOOR, pack, rotate, unpack

BLOCKS, DIMS, HEADS = (1, 7, 16, 64), (32, 128), (1, 2)
LARGEST = 65504.0  # of fp16, in which scales and zeros are stored
SHAPES = [(s, d, h) for s in BLOCKS for d in DIMS for h in HEADS]


def geometry(slots, dim, heads, layers=1):
    return CacheGeometry(layers, heads, heads, dim, slots)


def contents(kind: str, slots, dim, heads, device="cpu"):
    """Two blocks of a kind, fp32 [2, S, H, D]."""
    x = torch.randn(2, slots, heads, dim, generator=torch.Generator().manual_seed(slots * dim))
    if kind == "outliers":
        x[..., ::11] *= 200.0
        x[:, ::5] -= 3.0
    elif kind == "constant":
        x = torch.full_like(x, -1234.567)
    elif kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "tiny":
        x *= 1e-7
    elif kind == "large":
        x *= LARGEST / 2 / x.abs().max()
    return x.to(device)


KINDS = ("normal", "outliers", "constant", "zeros", "tiny", "large")


def ends(codec, planes):
    """What the first and the last code of each element stand for."""
    for byte in (0, 255):
        codes = {n: torch.full_like(planes[n], byte) for n in codec.bit_planes}
        yield codec.dequantize(planes | codes, torch.float32)


def bound(codec, x, planes):
    """Largest error of each element, derived from the codec and its stored scales, as [N, S, H, D].

    Integers: half a step; a zero point rounded to fp16 moves the grid by half an fp16 ulp at most.
    e4m3: half an ulp of 3 mantissa bits, and half the smallest subnormal step below 2^-6.
    """
    if isinstance(codec, Dense):
        info = torch.finfo(codec.dtype)
        return x.abs() * info.eps / 2 + info.tiny * info.eps
    slots = x.shape[1]
    if isinstance(codec, Grouped):  # half a step, or what the stored range leaves out
        low, high = ends(codec, planes)
        step = (high - low) / (2**codec.bits - 1)
        return torch.maximum(step / 2, torch.maximum(low - x, x - high)) * 1.001 + x.abs() * 2**-20
    along = -2 if resolve_axis(codec.axis, slots) == "channel" else -1
    scale = planes["scale"].float().unsqueeze(along).transpose(1, 2)
    if isinstance(codec, Fp8):
        if "zero" in planes:
            x = x - planes["zero"].float().unsqueeze(along).transpose(1, 2)
        return torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.001
    off = 0.0 if codec.symmetric else x.abs().amax(1 if along == -2 else 3, True) * 2**-11 + 2**-25
    return (scale / 2 + off) * 1.001 + x.abs() * 2**-22


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slots,dim,heads", SHAPES)
def test_planes_are_what_quantize_gives(name, slots, dim, heads):
    format, g = by_name(name), geometry(slots, dim, heads, layers=3)
    x = contents("normal", slots, dim, heads)
    stored, declared = format.quantize(x, x + 1), format.planes(g)
    assert {n: (tuple(t.shape[1:]), t.dtype) for n, t in stored.items()} == {
        n: (p.shape, p.dtype) for n, p in declared.items()
    }
    real = sum(t[0].nbytes for t in stored.values())
    assert format.block_bytes(g) == g.layers * real
    assert format.bits_per_element(g) == 8 * real / (2 * x[0].numel())
    assert all(t.is_contiguous() for t in stored.values())


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_really_packed(name):
    """With 64 slots and 128 dims a scale or zero of 16 bits costs at most 1/4 bit an element; one
    of 8 bits for 32 elements, too."""
    format, g = by_name(name), geometry(64, 128, 2)
    sides = [c for c in (format.key, format.value) if not isinstance(c, Dense)]
    assert format.payload_bits <= format.bits_per_element(g) <= format.payload_bits + 0.64
    assert (format.bits_per_element(g) > format.payload_bits) == bool(sides)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_error(name, kind):
    format = by_name(name)
    for slots, dim, heads in SHAPES:
        check_round_trip(format, contents(kind, slots, dim, heads))


def check_round_trip(format, x):
    k, v = x, x.flip(1) * 0.75
    stored = format.quantize(k, v)
    for prefix, codec, before, after in zip(
        ("k_", "v_"), (format.key, format.value), (k, v), format.dequantize(stored, torch.float32)
    ):
        planes = {n[2:]: t for n, t in stored.items() if n[:2] == prefix}
        if codec.rotated:  # the bound is that of what was stored
            codec, before = codec.codec, rotate(before)
            after = codec.dequantize(planes, torch.float32)
        error = (after - before).abs()
        assert after.shape == before.shape and torch.isfinite(after).all()
        assert (error <= bound(codec, before, planes)).all(), error.max()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_on_cuda_is_the_cpu_one(name):
    format, x = by_name(name), contents("outliers", 16, 128, 2)
    check_round_trip(format, x.cuda())
    for n, plane in format.quantize(x.cuda(), x.cuda()).items():
        expected = format.quantize(x, x)[n]
        assert torch.equal(plane.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "fp16"])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_values_beyond_fp16_saturate(name, axis):
    """bf16 activations may exceed what an fp16 scale or zero can say: a large number, no NaN."""
    format, x = by_name(name), contents("normal", 16, 32, 2) * 1e30
    x[:, 3] = -1e30
    for codec in (format.key, format.value):
        if not isinstance(codec, Dense):
            codec.axis = axis
    for after in format.dequantize(format.quantize(x, x), torch.float32):
        assert torch.isfinite(after).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_in_the_dtype_asked_for(name, dtype):
    format, x = by_name(name), contents("normal", 16, 32, 2)
    k, v = format.dequantize(format.quantize(x.to(dtype), x.to(dtype)), dtype)
    assert k.dtype == v.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_independent_and_rows_keep_their_order(name):
    """Token s of head h comes back at [s, h], and no block depends on its neighbour."""
    format, x = by_name(name), contents("outliers", 16, 32, 2)
    both = format.dequantize(format.quantize(x, -x), torch.float32)
    for i in range(2):
        alone = format.dequantize(format.quantize(x[i : i + 1], -x[i : i + 1]), torch.float32)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, both))
    marks = torch.arange(16.0)[:, None] * 2 + torch.arange(2.0)
    x = marks[None, :, :, None].expand(1, 16, 2, 32)
    k, v = format.dequantize(format.quantize(x, x), torch.float32)
    step = 31 / (2 ** min(format.key.bits, 12) - 1)
    assert (k[0, :, :, 0] - marks).abs().max() <= max(step, 31 * 2**-4)
    assert (v[0, :, :, 0] - marks).abs().max() <= max(step, 31 * 2**-4)


@pytest.mark.parametrize("codec", [Int(b, a, s, t) for b in (8, 4, 3, 2) for a in
                                   ("channel", "token") for s in (True, False)
                                   for t in (True, False)] + [Fp8("channel"), Fp8("token", True),
                                                               Fp8("channel", centred=True)],
                         ids=repr)  # fmt: skip
def test_every_granularity_keeps_its_bound(codec):
    for kind in KINDS:
        x = contents(kind, 16, 32, 2)
        planes = codec.quantize(x)
        after = codec.dequantize(planes, torch.float32)
        assert ((after - x).abs() <= bound(codec, x, planes)).all()
        declared = codec.planes(16, 2, 32)
        assert {n: tuple(t.shape[1:]) for n, t in planes.items()} == {
            n: p.shape for n, p in declared.items()
        }


ASYMMETRIC = [Int(b, a) for b in (8, 4, 3, 2) for a in ("channel", "token")]
SYMMETRIC = [Int(b, a, True) for b in (8, 4, 3, 2) for a in ("channel", "token")]


def sealed_again(codec, x, times=2):
    """Planes of `x` in its dtype, and what sealing gives of what is read in that dtype, again."""
    planes = [codec.quantize(x)]
    for _ in range(times):
        planes.append(codec.quantize(codec.dequantize(planes[-1], x.dtype)))
    return planes


def same(one, two) -> bool:
    """The same bits, but for the sign of a zero point of 0."""
    return all(torch.equal(x.view(torch.uint8), two[n].view(torch.uint8)) if n != "zero" else
               torch.equal(x, two[n]) for n, x in one.items())  # fmt: skip


def spread_out(kind, slots, dtype):
    """More blocks, whose channels have means and widths of their own."""
    draw = torch.Generator().manual_seed(slots)
    x = torch.randn(24, slots, 2, 32, generator=draw)
    if kind == "shifted":
        x = x * (2 * torch.randn(32, generator=draw)).exp() + 5 * torch.randn(32, generator=draw)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", SYMMETRIC + [Fp8("token"), Fp8("channel"), Dense("bfloat16")],
                         ids=repr)  # fmt: skip
def test_sealing_what_a_block_reads_gives_its_bits(codec, dtype):
    for slots in (7, 16):
        blocks = [contents(kind, slots, 32, 2).to(dtype) for kind in KINDS]
        for x in blocks + [spread_out(kind, slots, dtype) for kind in ("normal", "shifted")]:
            once, twice, _ = sealed_again(codec, x)
            assert same(once, twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", ASYMMETRIC, ids=repr)
def test_a_zero_comes_back_with_its_scale(codec, dtype):
    """The same bits again in bf16. Elsewhere the rounding of a zero or of a sum may move a scale,
    below 8 bits one in a hundred; then it does so once."""
    for slots in (7, 16):
        blocks = [contents(kind, slots, 32, 2).to(dtype) for kind in KINDS]
        for x in blocks + [spread_out(kind, slots, dtype) for kind in ("normal", "shifted")]:
            once, twice, more = sealed_again(codec, x)
            moved = (once["scale"] != twice["scale"]).float().mean()
            assert same(twice, more)
            if dtype == torch.bfloat16:
                assert same(once, twice)
            elif codec.bits < 8:
                assert torch.equal(once["zero"], twice["zero"]) and moved < 0.01


GROUPED = [Grouped(bits, axis, group, scales, axis == "channel", search)
           for bits in (4, 3, 2) for axis, group, scales in
           (("channel", 32, "fp8"), ("token", 32, "fp8"), ("channel", 16, "fp16"))
           for search in (False, True)]  # fmt: skip


@pytest.mark.parametrize("codec", GROUPED, ids=repr)
def test_groups_lose_half_a_step_and_what_they_clip(codec):
    for kind in KINDS:
        x = contents(kind, 64, 64, 2)
        planes = codec.quantize(x)
        after = codec.dequantize(planes, torch.float32)
        error = (after - x).abs()
        assert torch.isfinite(after).all() and (error <= bound(codec, x, planes)).all()
        if not codec.search and kind == "normal":
            low, high = ends(codec, planes)  # rounded scales and zeros leave out a step and a half
            assert (error <= 1.5 * (high - low) / (2**codec.bits - 1)).all()
    assert {n: (tuple(t.shape[1:]), t.dtype) for n, t in planes.items()} == {
        n: tuple(p) for n, p in codec.planes(64, 2, 64).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", GROUPED, ids=repr)
def test_a_group_that_is_sealed_again_does_not_drift(codec, dtype):
    """A few groups move once, where a rounded mean or a rounded value lay on an edge; then none
    does, and what they read is as near to what came in."""
    for kind in ("normal",) if codec.axis == "token" else ("normal", "shifted"):
        x, reads = spread_out(kind, 64, dtype), []
        for _ in range(6):
            reads.append(codec.dequantize(codec.quantize(reads[-1] if reads else x), dtype))
        moved = [(a != b).float().mean() for a, b in zip(reads, reads[1:])]
        if codec.scales == "fp8":  # one of 16 bits may follow what a value lost in its dtype
            assert moved[0] < 0.12 and moved[1] < 0.02 and moved[-1] < 1e-3
        first, last = ((r.float() - x.float()).square().sum((0, 1)) for r in (reads[0], reads[-1]))
        grown = (last / first)[first > 0]
        assert grown.median() < 1.1 and grown.quantile(0.95) < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_middles_of_fp8_stay_where_they_are(dtype):
    """Where rounding in the compute dtype moves one, it does so once."""
    codec = Fp8("auto", centred=True)
    for kind in ("normal", "shifted"):
        x, planes = spread_out(kind, 64, dtype), []
        for _ in range(4):
            planes.append(codec.quantize(x))
            x = codec.dequantize(planes[-1], dtype)
        moved = [(a["zero"] != b["zero"]).float().mean() for a, b in zip(planes, planes[1:])]
        assert moved[0] < 0.02 and moved[-1] < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp8_around_middles_settles(dtype):
    """However often a block is sealed, from the third time on it reads the same to the bit. Where
    16 bits cannot tell middles apart (channels of a float32 model at 400, as wide as 1), a few in a
    hundred go to and fro between two neighbours: what is read goes off by an eighth of a channel's
    width at most, however often."""
    codec, draw = Fp8("auto", centred=True), torch.Generator().manual_seed(1)
    noise, off = (torch.randn(*s, generator=draw) for s in ((24, 64, 2, 32), (32,)))

    def read(x, times):
        for _ in range(times):
            x = codec.dequantize(codec.quantize(x), dtype)
        return x

    for far in (10, 40):
        x = (noise + far * off).to(dtype)
        assert torch.equal(read(x, 3), read(x, 12))
    x = (noise + 400 * off).to(dtype)
    once, often = read(x, 1), read(x, 100)
    if dtype != torch.float32:
        assert torch.equal(read(x, 4), often)
    changing = (read(often, 1) != often).float().mean()
    assert changing < 0.1
    width = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).float()
    assert ((often.float() - once.float()).abs() / width).max() < 1 / 6


def test_fp8_around_middles_errs_less_where_channels_have_means():
    x = spread_out("shifted", 64, torch.float32)
    error = [(c.dequantize(c.quantize(x), torch.float32) - x).square().mean((0, 1))
             for c in (Fp8("channel"), Fp8("channel", centred=True))]
    assert (error[1] / error[0]).median() < 0.7


def test_searched_clips_err_less():
    x = torch.randn(4, 128, 2, 64, generator=torch.Generator().manual_seed(3)) ** 3
    for bits in (4, 3, 2):
        error = [(c.dequantize(c.quantize(x), torch.float32) - x).square().sum()
                 for c in (Grouped(bits, "channel", search=s) for s in (False, True))]
        assert error[1] < error[0]


def test_groups_fit_the_block_and_the_head():
    codec = Grouped(4, centred=True)
    told = {s: (codec.axis_of(s), codec.span(s, 64), codec.has_mean(s)) for s in (4, 16, 48, 96)}
    assert told == {4: ("token", 32, False), 16: ("channel", 16, True), 48: ("channel", 16, True),
                    96: ("channel", 32, True)}  # fmt: skip
    assert Grouped(4, "token").span(7, 80) == 16
    with pytest.raises(BadInput, match="block_size=20: must be a multiple of 8"):
        Grouped(4, "channel").planes(20, 2, 64)
    with pytest.raises(BadInput, match="no groups of 8 or more in head_dim 36"):
        Grouped(4, "token").planes(16, 2, 36)


def test_scales_are_normal_numbers():
    planes = by_name("int4").quantize(*[contents("zeros", 16, 32, 2)] * 2)
    assert planes["k_scale"].min() >= SCALE_FLOOR and planes["v_scale"].min() >= SCALE_FLOOR


def test_unknown_names_list_the_known():
    with pytest.raises(BadInput) as error:
        by_name("int5")
    assert all(name in str(error.value) for name in NAMES) and "int5" in str(error.value)


@pytest.mark.parametrize("name,dim,least", [("int4", 33, 2), ("int2", 34, 4), ("int3", 36, 8),
                                            ("k4v2", 66, 4), ("k3v2", 36, 8)])  # fmt: skip
def test_head_dims_that_cannot_be_packed_are_refused(name, dim, least):
    with pytest.raises(BadInput, match=f"head_dim {dim}.*multiple of {least}"):
        by_name(name).planes(geometry(16, dim, 2))
    by_name(name).planes(geometry(16, -(-dim // least) * least, 2))


@pytest.mark.parametrize("make", [lambda: Int(5), lambda: Int(4, axis="head"), lambda: Fp8("row"),
                                  lambda: Grouped(8), lambda: Grouped(4, group=24),
                                  lambda: Grouped(4, scales="int8"),
                                  lambda: Grouped(4, "token", centred=True),
                                  lambda: Dense("float64")])  # fmt: skip
def test_impossible_codecs_are_refused(make):
    with pytest.raises(BadInput):
        make()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**31))
def test_unpack_inverts_pack(bits, bytes_, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    width = bytes_ * 8 // bits
    codes = torch.randint(0, 2**bits, (rows, width), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, bytes_)
    assert torch.equal(unpack(packed, bits), codes)
    parts = 8 // bits
    assert packed[0, 0] == sum(int(codes[0, i * bytes_]) << (i * bits) for i in range(parts))


@pytest.mark.parametrize("name, slots, warned", [
    ("int4", 8, True), ("int4", 16, False), ("int8", 8, True), ("int4g", 8, True),
    ("int4g", 32, False), ("fp8", 8, False), ("bf16", 1, False), ("k4v2", 8, True),
])  # fmt: skip
def test_evenly_spaced_keys_by_token_are_cautioned_against(name, slots, warned):
    told = by_name(name).caution(slots)
    assert bool(told) == warned
    if warned:
        assert f"{name} scales keys by token in blocks of {slots} tokens, and outlier" in told
        assert told.endswith("cache.block_size of 32 or more")


def test_the_caution_is_true_of_keys_with_outlier_channels():
    """The error of the other channels in a block of 8 is far above that in one of 32."""
    x = torch.randn(4, 32, 2, 64, generator=torch.Generator().manual_seed(0))
    x[..., 5] += 60.0

    def error(slots):
        k = x.reshape(-1, slots, 2, 64)
        back = by_name("int4").dequantize(by_name("int4").quantize(k, k), torch.float32)[0]
        return (back - k)[..., 6:].square().mean().item()

    assert error(8) > 20 * error(32)


def test_a_codec_of_one_s_own_by_token_names_the_axis_to_change():
    told = KVFormat(Int(4, "token"), Int(4, "token"), "mine").caution(64)
    assert told.startswith("mine scales keys by token, and") and told.endswith("axis=channel")
