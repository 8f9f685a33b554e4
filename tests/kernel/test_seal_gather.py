"""Sealing and gathering give the very bits of the reference codec."""

import pytest
import torch
from harness import stores

from kvlab.core import CacheGeometry
from kvlab.format import NAMES, Dense, Fp8, Grouped, Int, KVFormat, Rotated, by_name
from kvlab.kernel import blocks_ref

gather = pytest.importorskip("kvlab.kernel.gather_triton").gather
seal_triton = pytest.importorskip("kvlab.kernel.seal_triton")

FORMATS = {name: by_name(name) for name in NAMES} | {
    "int4 mixed axes": KVFormat(Int(4, "token", True), Int(4, "channel", slots_last=True)),
    "int3 slots last": KVFormat(Int(3, "token", True, True), Int(3, "channel")),
    "fp8 per channel": KVFormat(Fp8("channel", True), Fp8("channel")),
    "int8 with zeros": KVFormat(Int(2, "channel", True), Int(8, "token", False, True)),
    "rotated int2": KVFormat(Int(4), Rotated(Int(2, "token", slots_last=True))),
    "groups, other axes": KVFormat(Grouped(4, "token", 16, slots_last=True),
                                   Grouped(3, "channel", 8, centred=True, search=True)),
    "fp8 around middles, both": KVFormat(Fp8("channel", True, True), Fp8("channel", False, True)),
    "rotated fp8": KVFormat(Dense("float16"), Rotated(Fp8("channel"))),
}
SHAPES = [(16, 64, torch.bfloat16), (24, 128, torch.float16), (4, 32, torch.float32)]
BLOCKS = [5, 0, 3]


def make(format, slots, dim, dtype, device):
    geometry = CacheGeometry(2, 4, 2, dim, slots)
    sealed, _ = stores(format, geometry, 6, 1, dtype, device)
    k, v = (torch.randn(3 * slots, 2, dim, device=device).to(dtype) for _ in range(2))
    k[:, 1, 3] += 40
    k[:slots, 0] = 0  # a constant channel, a silent head and a silent token
    v[1] = 0
    return sealed, k, v, torch.tensor(BLOCKS, device=device)


def split(x, slots):
    return x.unflatten(0, (3, slots))


@pytest.mark.parametrize("slots, dim, dtype", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_seal_writes_the_reference_bits(name, slots, dim, dtype, device):
    if slots < 8 and name == "groups, other axes":
        pytest.skip("no group of tokens in so small a block")
    sealed, k, v, ids = make(FORMATS[name], slots, dim, dtype, device)
    other = sealed.read(1, [1, 2, 4])
    seal_triton.seal(k, v, FORMATS[name], sealed.layer(1), ids)
    want = FORMATS[name].quantize(split(k, slots), split(v, slots))
    for plane, got in sealed.read(1, BLOCKS).items():
        assert torch.equal(got.view(torch.uint8), want[plane].view(torch.uint8)), plane
    for plane, before in other.items():  # neighbours are left alone
        after = sealed.read(1, [1, 2, 4])[plane]
        assert torch.equal(after.view(torch.uint8), before.view(torch.uint8))


SLICES = [("int4g", 128, 64, torch.bfloat16), ("int3g", 32, 128, torch.float16),
          ("k3v2g", 64, 32, torch.float32)]  # fmt: skip


@pytest.mark.parametrize("name, slots, dim, dtype", SLICES)
def test_several_groups_of_tokens(name, slots, dim, dtype, device):
    sealed, k, v, ids = make(FORMATS[name], slots, dim, dtype, device)
    seal_triton.seal(k, v, FORMATS[name], sealed.layer(1), ids)
    want = FORMATS[name].quantize(split(k, slots), split(v, slots))
    for plane, got in sealed.read(1, BLOCKS).items():
        assert torch.equal(got.view(torch.uint8), want[plane].view(torch.uint8)), plane


@pytest.mark.parametrize("name, slots, dim, dtype, top", [
    *[(*case, 1.0) for case in SLICES],
    *[(name, 16, 32, torch.bfloat16, 1.0) for name in ("int2g", "k4v2g")],
    *[(name, 16, 32, torch.bfloat16, 1e30) for name in NAMES if name.endswith("g")],
])
def test_threads_that_hold_groups(name, slots, dim, dtype, top, device, monkeypatch):
    """Several groups of tokens, slices of channels, parts of bytes, and where fp16 ends. One block,
    which has all that is odd: the interpreter takes ten times as long by this kernel."""
    monkeypatch.setattr(seal_triton, "HELD", True)
    sealed, k, v, ids = make(FORMATS[name], slots, dim, dtype, device)
    k, v, ids = k[:slots], v[:slots], ids[:1]
    if top > 1:
        k[:, 1], v[3] = k[:, 1] * top, -top
    pair = seal_triton.sides(FORMATS[name], sealed.layer(1).planes, slots, dim)
    assert seal_triton._held(*pair, slots, dim)
    seal_triton.seal(k, v, FORMATS[name], sealed.layer(1), ids)
    want = FORMATS[name].quantize(k[None], v[None])
    for plane, got in sealed.read(1, BLOCKS[:1]).items():
        assert torch.equal(got.view(torch.uint8), want[plane].view(torch.uint8)), plane
        assert torch.isfinite(got.float()).all()


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.key.bits <= 8])
def test_seal_saturates_where_fp16_ends(name, device):
    """Scales and zeros beyond 65504: the reference's bits again, and no inf among them."""
    sealed, k, v, ids = make(FORMATS[name], 16, 64, torch.bfloat16, device)
    k[:, 0], v[3] = k[:, 0] * 1e30, -1e30
    seal_triton.seal(k, v, FORMATS[name], sealed.layer(1), ids)
    want = FORMATS[name].quantize(split(k, 16), split(v, 16))
    for plane, got in sealed.read(1, BLOCKS).items():
        assert torch.equal(got.view(torch.uint8), want[plane].view(torch.uint8)), plane
        assert torch.isfinite(got.float()).all()


@pytest.mark.parametrize("slots, dim, dtype", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_gather_reads_what_the_codec_reads(name, slots, dim, dtype, device):
    if slots < 8 and name == "groups, other axes":
        pytest.skip("no group of tokens in so small a block")
    sealed, k, v, ids = make(FORMATS[name], slots, dim, dtype, device)
    sealed.write(1, BLOCKS, FORMATS[name].quantize(split(k, slots), split(v, slots)))
    out_k, out_v = torch.empty_like(k), torch.empty_like(v)
    gather(sealed.layer(1), FORMATS[name], ids, out_k, out_v)
    want = FORMATS[name].dequantize(sealed.read(1, BLOCKS), dtype)
    assert torch.equal(out_k, want[0].flatten(0, 1)) and torch.equal(out_v, want[1].flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["fp8", "fp8c", "int8", "int4", "k3v2", "int4 mixed axes"])
def test_a_block_that_is_read_and_sealed_again_keeps_its_bits(name, dtype, device):
    """Through both kernels; a scale that climbed a step each time would grow without end."""
    sealed, k, v, ids = make(FORMATS[name], 16, 64, dtype, device)
    k[:, 1, 3] -= 30  # at 40 widths from zero fp16 hardly tells the steps of int4 apart
    seal_triton.seal(k, v, FORMATS[name], sealed.layer(1), ids)
    first = sealed.read(1, BLOCKS)
    gather(sealed.layer(1), FORMATS[name], ids, k, v)
    read = k.clone(), v.clone()
    seal_triton.seal(k, v, FORMATS[name], sealed.layer(1), ids)
    for plane, got in sealed.read(1, BLOCKS).items():
        if (name, dtype, plane) == ("fp8c", torch.bfloat16, "k_data"):
            continue  # near a channel's middle codes are finer than bf16 is so far from zero
        assert torch.equal(got.view(torch.uint8), first[plane].view(torch.uint8)), plane
    gather(sealed.layer(1), FORMATS[name], ids, k, v)
    assert torch.equal(k, read[0]) and torch.equal(v, read[1])


@pytest.mark.parametrize("slots, dim, dtype", SHAPES)
@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "int4", "int3", "int4g",
                                  "int4 mixed axes"])  # fmt: skip
def test_seal_open_takes_all_layers_at_once(name, slots, dim, dtype, device):
    geometry = CacheGeometry(2, 4, 2, dim, slots)
    pairs = [stores(FORMATS[name], geometry, 6, 3, dtype, device) for _ in range(2)]
    rows = {(layer, row): torch.randn(2, 2, slots, dim, device=device).to(dtype)
            for layer in range(2) for row in range(3)}
    ids = [torch.tensor(x, device=device) for x in ([2, 0], [5, 1])]
    for (sealed, open_), call in zip(pairs, (seal_triton.seal_open, blocks_ref.seal_open)):
        for slab in sealed.slabs.values():
            slab.fill_(7)
        for (layer, row), x in rows.items():
            views = open_.block(layer, row)
            views["k_data"].copy_(x[0]), views["v_data"].copy_(x[1])
        call(open_.layer(0), sealed.layer(0), FORMATS[name], *ids, 2)
    for mine, theirs in zip(pairs[0][0].slabs.values(), pairs[1][0].slabs.values()):
        assert torch.equal(mine, theirs)
    k, v = rows[1, 2].transpose(1, 2)
    want = FORMATS[name].quantize(k[None], v[None])
    for plane, got in pairs[0][0].block(1, 5).items():
        assert torch.equal(got.view(torch.uint8), want[plane][0].view(torch.uint8)), plane


def test_empty_lists_do_nothing(device):
    sealed, k, v, ids = make(FORMATS["int8"], 16, 64, torch.float16, device)
    before = {i: slab.clone() for i, slab in sealed.slabs.items()}
    seal_triton.seal(k[:0], v[:0], FORMATS["int8"], sealed.layer(1), ids[:0])
    gather(sealed.layer(1), FORMATS["int8"], ids[:0], k[:0], v[:0])
    assert all(torch.equal(before[i], slab) for i, slab in sealed.slabs.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_append_writes_one_slot_per_row(dtype, device):
    geometry = CacheGeometry(2, 4, 2, 64, 16)
    _, store = stores(by_name("fp32"), geometry, 1, 4, dtype, device)
    k, v = (torch.randn(4, 2, 64, device=device).to(dtype) for _ in range(2))
    slots = torch.tensor([2, 0, 3, 1], dtype=torch.int32, device=device)
    lens = torch.tensor([3, 15, -1, 16], dtype=torch.int32, device=device)  # two rows sit out
    want = {r: {n: x.clone() for n, x in store.block(1, r).items()} for r in range(4)}
    for row, (slot, n) in enumerate(zip(slots.tolist(), lens.tolist())):
        if 0 <= n < 16:
            want[slot]["k_data"][:, n], want[slot]["v_data"][:, n] = k[row], v[row]
    seal_triton.append(k, v, store.layer(1), slots, lens)
    for r in range(4):
        for name, x in store.block(1, r).items():
            assert torch.equal(x.view(torch.uint8), want[r][name].view(torch.uint8)), (r, name)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "int3g", "k4v2", "fp8c"])
def test_layers_together(name, device):
    """What each head keeps of two layers at once: sealed as the reference does, read as one."""
    format, slots, dim = FORMATS[name], 16, 64
    sealed, *_, ids = make(format, slots, dim, torch.float16, device)
    want, _ = stores(format, CacheGeometry(2, 4, 2, dim, slots), 6, 1, torch.float16, device)
    for slab, buffer in want.slabs.items():
        buffer.copy_(sealed.slabs[slab])
    k, v = (torch.randn(2, 70, 2, dim, device=device).to(torch.float16) for _ in range(2))
    index = torch.stack([torch.randperm(70)[: 3 * slots].sort().values for _ in range(4)])
    index = index.view(2, 2, -1).to(device)
    seal_triton.seal_kept(k, v, index, format, sealed.layer(0), ids)
    blocks_ref.seal_kept(k, v, index, format, want.layer(0), ids)
    for slab, buffer in want.slabs.items():
        assert torch.equal(buffer, sealed.slabs[slab])
    out_k, out_v = (torch.full((2, 80, 2, dim), 7.0, device=device).half() for _ in range(2))
    mine = (x[:, : 3 * slots] for x in (out_k, out_v))
    gather(sealed.layer(0), format, ids, *mine)
    for layer in range(2):
        read = format.dequantize(sealed.read(layer, BLOCKS), torch.float16)
        for out, x in zip((out_k, out_v), read):
            assert torch.equal(out[layer, : 3 * slots], x.flatten(0, 1))
            assert (out[layer, 3 * slots :] == 7).all()  # what lies behind is left alone


def test_gather_leaves_places_without_a_block_alone(device):
    format = FORMATS["int8"]
    sealed, k, v, ids = make(format, 16, 64, torch.bfloat16, device)
    seal_triton.seal(k, v, format, sealed.layer(1), ids)
    outs = [[torch.full((n * 16, 2, 64), 7.0, dtype=torch.bfloat16, device=device)
             for _ in range(2)] for n in (3, 5)]
    gather(sealed.layer(1), format, ids, *outs[0])
    some = torch.tensor([-1, *BLOCKS, -1], device=device)
    gather(sealed.layer(1), format, some, *outs[1])
    for want, got in zip(*outs):
        assert torch.equal(got[16:-16], want) and (got[:16] == 7).all() and (got[-16:] == 7).all()
