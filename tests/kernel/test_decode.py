"""Decode attention against an fp32 oracle on the stored values."""

from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from harness import Store, past

from kvlab.core import BadInput
from kvlab.format import NAMES, Dense, Fp8, Grouped, Int, KVFormat, Rotated, by_name
from kvlab.format.base import Codec, Plane
from kvlab.kernel import blocks_ref
from kvlab.kernel.scratch import Scratch

decode = pytest.importorskip("kvlab.kernel.decode_triton")
seal_triton = pytest.importorskip("kvlab.kernel.seal_triton")
SCRATCH = Scratch()  # whose contents no call may depend on


def run(p, q, *, mass=None, setting=None, scale=None, new=None, apart=None):
    for buffer in SCRATCH.tensors:
        if buffer.is_floating_point():
            buffer.fill_(float("nan"))
    table, counts, slots, tails = p.args
    return decode.paged_decode(
        q, p.sealed.layer(1), p.format, table, counts, p.open.layer(1), slots, tails, new=new,
        scale=scale or q.shape[2] ** -0.5, mass=mass, setting=setting, scratch=SCRATCH,
        apart=apart,
    )


def oracle(q, k, v):
    """fp32 attention of q [Hq, D] over k, v [n, H, D]: out, lse, probabilities [Hq, n]."""
    heads, dim = q.shape
    grouped = q.float().view(k.shape[1], -1, dim)
    logits = torch.einsum("hgd,nhd->hgn", grouped, k) * dim**-0.5
    p = logits.softmax(-1)
    out = torch.einsum("hgn,nhd->hgd", p, v).reshape(heads, dim)
    return out, logits.logsumexp(-1).reshape(heads), p.reshape(heads, -1)


def plain_error(q, k, v, out):
    """Relative error of torch's own attention in q's dtype on the same values."""
    args = (x.to(q.dtype).transpose(0, 1)[None] for x in (k, v))
    got = F.scaled_dot_product_attention(q[None, :, None], *args, enable_gqa=True)[0, :, 0]
    return relative(got, out)


def relative(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


def check(p, dtype, device, setting=None, floor=2e-4):
    """Error at most twice plain torch's, or `floor`: 16 bits of the query, of which an outlier
    channel takes some."""
    g = p.geometry
    q = torch.randn(len(p.keys), g.query_heads, g.head_dim, device=device).to(dtype)
    mass = torch.full((*q.shape[:2], p.args[0].shape[1]), float("nan"), device=device)
    out, lse = run(p, q, mass=mass, setting=setting)
    for b, (k, v) in enumerate(zip(p.keys, p.values)):
        if not len(k):
            assert (lse[b] == -torch.inf).all() and not out[b].any() and not mass[b].any()
            continue
        want, want_lse, weights = oracle(q[b], k, v)
        assert relative(out[b], want) <= max(2 * plain_error(q[b], k, v, want), floor)
        torch.testing.assert_close(lse[b], want_lse, atol=1e-3, rtol=0)
        count = int(p.args[1][b])
        share = weights[:, : count * g.block_size].unflatten(1, (count, g.block_size)).sum(-1)
        torch.testing.assert_close(mass[b, :, :count], share, atol=5e-4, rtol=0)
        assert not mass[b, :, count:].any()


# Each format in one of the two dtypes; the first that has no scales and the first that has in both.
TYPED = [*zip(NAMES, cycle([torch.float16, torch.bfloat16])),
         ("fp16", torch.float16), ("fp8", torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), TYPED, ids=str)
def test_formats(name, dtype, device):
    p = past(by_name(name), [70, 33], H=1, dtype=dtype, device=device)
    check(p, dtype, device, floor=HALVES if name.endswith("g") else 2e-4)


PAIRS = {
    "int4 token": (Int(4, "token"), Int(4, slots_last=True, axis="token")),
    "values per channel": (Int(4, "token"), Int(4, "channel", slots_last=True)),
    "symmetric int3": (Int(3, "channel", True), Int(3, "channel", True, True)),
    "int8 with zeros, fp8 per channel": (Int(8, "token"), Fp8("channel", True)),
    "fp8 per channel, slow value layout": (Fp8("channel"), Int(4, "token")),
    "slow key layout": (Int(8, "auto", slots_last=True), Fp8("token")),
    "dense keys": (Dense("float16"), Int(2, "token", slots_last=True)),
    "rotated, four to a byte": (Int(4), Rotated(Int(2, "token", slots_last=True))),
    "rotated, two to a byte, per channel": (Int(8), Rotated(Int(4, "channel", slots_last=True))),
    "rotated fp8": (Fp8("token"), Rotated(Fp8("token", True))),
    "fp8 around middles, both": (Fp8("channel", False, True), Fp8("channel", True, True)),
    "rotated, dense": (Dense("float16"), Rotated(Dense("float16"))),
}


SHAPES = [(16, (64, 4, 3, 2)), (64, (32, 4, 3, 2)), (24, None)]  # slots, setting


@pytest.mark.parametrize("pair, slots, setting", [
    (pair, *SHAPES[(n + k) % 3]) for n, pair in enumerate(PAIRS) for k in range(2)])
def test_pairs(pair, slots, setting, device):
    """Each pair in two of three shapes, each shape with two of three pairs."""
    p = past(KVFormat(*PAIRS[pair]), [2 * slots + 5, slots], H=1, S=slots, device=device)
    check(p, torch.float16, device, setting)


@pytest.mark.parametrize("name, slots", [
    ("bf16", 1), ("bf16", 128), ("fp8", 4), ("fp8", 256), ("int8", 1), ("int8", 32), ("int8", 128),
    ("int4", 4), ("int4", 32), ("int4", 256)])
def test_block_sizes(name, slots, device):
    p = past(by_name(name), [slots * 2 + slots // 2, slots - 1], H=1, S=slots, device=device)
    check(p, torch.float16, device)


@pytest.mark.parametrize("name, slots, opened, lengths", [
    ("int8", 64, 2, [64 * 4 + 5, 70, 0]), ("int2", 16, 3, [16 * 5, 3]), ("int4", 48, 1, [150, 96])])
def test_several_open_blocks(name, slots, opened, lengths, device):
    """Whole blocks that are read as computed, in slots of one tile and of several."""
    p = past(by_name(name), lengths, H=1, S=slots, residual=opened, device=device)
    check(p, torch.float16, device)


@pytest.mark.parametrize("slots, length", [(64, 64 * 3 + 10), (64, 128), (16, 40), (16, 1)])
def test_the_newest_token_goes_to_the_last_open_block(slots, length, device):
    """As the reference has it: what is read, and what the open store holds then."""
    p = past(by_name("int8"), [length, 5], H=2, S=slots, residual=2, device=device)
    table, counts, places, tails = p.args
    q = torch.randn(2, p.geometry.query_heads, p.geometry.head_dim, device=device).half()
    new = tuple(torch.randn(2, 2, p.geometry.head_dim, device=device).half() for _ in range(2))
    for slab in p.open.slabs.values():
        slab.view(torch.float16).nan_to_num_(0.0)
    before = {i: slab.clone() for i, slab in p.open.slabs.items()}
    want = blocks_ref.paged_decode(q, p.sealed.layer(1), p.format, table, counts, p.open.layer(1),
                                   places, tails, scale=0.1, new=new)
    stored = {i: slab.clone() for i, slab in p.open.slabs.items()}
    for i, slab in p.open.slabs.items():
        slab.copy_(before[i])
    got = run(p, q, new=new, scale=0.1)
    for x, y in zip(got, want):
        torch.testing.assert_close(x.float(), y.float(), atol=2e-3, rtol=0)
    assert all(torch.equal(slab, stored[i]) for i, slab in p.open.slabs.items())


HALVES = 1e-3  # each stored number is an fp16 one in registers, of a head's largest 2^-12 off
GROUPS = {
    "other axes": KVFormat(Grouped(4, "token", 16, slots_last=True),
                           Grouped(3, "channel", 16, centred=True, search=True)),
    "long groups": KVFormat(Grouped(2, "channel", 64), Grouped(3, "token", 64, slots_last=True)),
    "mixed": KVFormat(Int(4), Grouped(2, "token", slots_last=True)),
}  # fmt: skip


@pytest.mark.parametrize("name, slots, dim", [
    ("int4g", 64, 128), ("int3g", 32, 64), ("k4v2g", 96, 64), ("int2g", 8, 32), ("int2g", 32, 256),
    ("other axes", 32, 64), ("other axes", 48, 64), ("long groups", 64, 128), ("mixed", 64, 64)])
def test_groups(name, slots, dim, device):
    """Blocks of whole groups and of parts of one; heads whose bytes hold several groups or one."""
    format = GROUPS.get(name) or by_name(name)
    p = past(format, [slots * 2 + 5, 7], H=1, S=slots, D=dim, device=device)
    check(p, torch.float16, device, floor=HALVES)


@pytest.mark.parametrize("name, slots, setting, dtype", [
    ("int4g", 128, (128, 1, 2, 4), torch.float16), ("int2g", 128, (64, 1, 2, 4), torch.bfloat16),
    ("int3g", 64, (64, 1, 2, 4), torch.float32), ("k4v2g", 16, None, torch.float16)])
def test_folds(name, slots, setting, dtype, device):
    """Several groups of tokens in a tile, and one; a query of one number and of two."""
    p = past(by_name(name), [slots * 2 + 5, slots], S=slots, dtype=dtype, device=device)
    check(p, dtype, device, setting, floor=HALVES)


@pytest.mark.parametrize("name, heads, group, dim", [
    ("fp16", 1, 1, 128), ("fp16", 3, 4, 32), ("int8", 2, 3, 64), ("int8", 1, 8, 128),
    ("int4", 1, 8, 128), ("int4", 3, 4, 32), ("int4", 1, 1, 128)])
def test_heads(name, heads, group, dim, device):
    p = past(by_name(name), [50, 0, 16], H=heads, G=group, D=dim, device=device)
    check(p, torch.float16, device)


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_float32_queries(name, device):
    p = past(by_name(name), [40, 7], dtype=torch.float32, device=device)
    check(p, torch.float32, device)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_a_long_tail_beside_a_sink(name, device):
    """A token twelve nats above the rest must not round the rest's probabilities to nothing."""
    p = past(by_name(name), [512], H=1, S=32, sink=5.0, device=device)
    q = torch.full((1, 2, 64), 0.25, device=device, dtype=torch.float16)
    want, _, weights = oracle(q[0], p.keys[0], p.values[0])
    assert weights[:, 0].min() > 0.5
    out, _ = run(p, q, setting=(32, 4, 3, 2))
    assert relative(out[0], want) < 1e-3


def picked(p, kv_heads):
    """A table per key/value head: heads read fewer, other and differently ordered blocks."""
    table, counts, slots, tails = p.args
    lines = [[line[torch.randperm(n)] for _ in range(kv_heads)] for line, n in zip(table, counts)]
    own = torch.full((*table.shape[:1], kv_heads, table.shape[1]), -1, dtype=torch.int32)
    sizes = torch.zeros(own.shape[:2], dtype=torch.int32)
    for b, heads in enumerate(lines):
        for h, ids in enumerate(heads):
            sizes[b, h] = max(0, len(ids) - h)
            own[b, h, : sizes[b, h]] = ids[: sizes[b, h]]
    device = table.device
    return p._replace(args=(own.to(device), sizes.to(device), slots, tails))


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("per_head", [False, True])
def test_agrees_with_the_reference(name, per_head, device):
    p = past(by_name(name), [100, 16, 9, 0], H=3, device=device)
    p = picked(p, 3) if per_head else p
    q = torch.randn(4, 6, 64, device=device, dtype=torch.float16)
    masses = [torch.full((4, 6, p.args[0].shape[-1]), float("nan"), device=device) for _ in "ab"]
    out, lse = run(p, q, mass=masses[0])
    want, want_lse = blocks_ref.paged_decode(
        q, p.sealed.layer(1), p.format, *p.args[:2], p.open.layer(1), *p.args[2:],
        scale=64**-0.5, mass=masses[1],
    )
    assert relative(out, want.float()) < 1e-3
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=0)
    torch.testing.assert_close(*masses, atol=5e-4, rtol=0)


def with_first(p, sinks, device, ragged=False):
    """First tokens of every row apart, like no token in its blocks; each head its own number."""
    g = p.geometry
    shape = (g.kv_heads, sinks, g.head_dim)
    planes = {"k_data": Plane(shape, p.open.specs["k_data"].dtype),
              "v_data": Plane(shape, p.open.specs["v_data"].dtype),
              "count": Plane((g.kv_heads,), torch.int32)}  # fmt: skip
    store, table, counts = Store(planes, 2, 1, len(p.keys), device), *p.args[:2]
    rows, blocks = [], []
    for b, (k, v) in enumerate(zip(p.keys, p.values)):
        row = store.block(1, len(p.keys) - 1 - b)
        for name in ("k_data", "v_data"):
            row[name].copy_(torch.randn(shape, device=device) * 3)
        there = counts[b].reshape(-1)[0] > 0 and b != 2  # row 2 has none
        for h in range(g.kv_heads):
            n = max(0, sinks - h) if ragged else sinks
            row["count"][h] = n
            if there:
                k[:n, h], v[:n, h] = row["k_data"][h, :n].float(), row["v_data"][h, :n].float()
        rows.append(len(p.keys) - 1 - b)
        blocks.append(int(table[b].reshape(-1)[0]) if there else -1)
    ints = (torch.tensor(x, dtype=torch.int32, device=device) for x in (rows, blocks))
    return blocks_ref.First(store.layer(1), *ints)


@pytest.mark.parametrize("name, S, sinks", [("int4", 16, 4), ("int2", 64, 64), ("fp8", 32, 5),
                                            ("int8", 16, 16), ("fp8", 7, 3)])
def test_reads_first_tokens_from_beside_their_block(name, S, sinks, device):
    p = past(by_name(name), [2 * S + 3, S, S, 0], H=2, D=32, S=S, device=device)
    first = with_first(p, sinks, device, ragged=True)
    q = torch.randn(4, 4, 32, device=device, dtype=torch.float16)
    mass = torch.full((4, 4, p.args[0].shape[1]), float("nan"), device=device)
    out, lse = run(p, q, mass=mass, apart=first)
    ref, ref_lse = blocks_ref.paged_decode(
        q, p.sealed.layer(1), p.format, *p.args[:2], p.open.layer(1), *p.args[2:],
        scale=32**-0.5, apart=first,
    )
    assert relative(out, ref.float()) < 1e-3
    torch.testing.assert_close(lse, ref_lse, atol=1e-3, rtol=0)
    for b, (k, v) in enumerate(zip(p.keys, p.values)):
        if not len(k):
            assert (lse[b] == -torch.inf).all() and not out[b].any()
            continue
        want, want_lse, weights = oracle(q[b], k, v)
        assert relative(out[b], want) < 1e-3
        torch.testing.assert_close(lse[b], want_lse, atol=1e-3, rtol=0)
        count = int(p.args[1][b])
        share = weights[:, : count * S].unflatten(1, (count, S)).sum(-1)
        torch.testing.assert_close(mass[b, :, :count], share, atol=5e-4, rtol=0)


def test_heads_read_first_tokens_with_the_block_that_has_them(device):
    p = picked(past(by_name("int4"), [100, 70, 40, 0], H=3, device=device), 3)
    first = with_first(p, 4, device)
    first.block[0] = p.args[0][0, 1, 0]  # in the table of head 1 alone, in the first place
    q = torch.randn(4, 6, 64, device=device, dtype=torch.float16)
    out, lse = run(p, q, apart=first)
    want, want_lse = blocks_ref.paged_decode(
        q, p.sealed.layer(1), p.format, *p.args[:2], p.open.layer(1), *p.args[2:],
        scale=64**-0.5, apart=first,
    )
    assert relative(out, want.float()) < 1e-3
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_many_rows_are_merged_by_their_last_programs(name, device):
    """More pairs than multiprocessors; again and again, for a merge that comes too early."""
    lengths = [64 * (i % 7) + i for i in range(48)]
    p = past(by_name(name), lengths, S=64, D=128, H=8, dtype=torch.bfloat16, device=device)
    q = torch.randn(48, 16, 128, device=device, dtype=torch.bfloat16)
    first = run(p, q)
    for b, (k, v) in enumerate(zip(p.keys, p.values)):
        if len(k):
            want, want_lse, _ = oracle(q[b], k, v)
            assert relative(first[0][b], want) <= max(2 * plain_error(q[b], k, v, want), 2e-4)
            torch.testing.assert_close(first[1][b], want_lse, atol=1e-3, rtol=0)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(run(p, q), first))


@pytest.mark.parametrize("name, S", [("bf16", 16), ("int4", 64)])
def test_puts_the_newest_token_into_its_block(name, S, device):
    """As `append` and then attention, to the bit; rows with an empty, a half and a full block."""
    q, k, v = (torch.randn(4, n, 64, device=device, dtype=torch.float16) for n in (6, 3, 3))
    p = past(by_name(name), [100, S, 9, S - 1], S=S, H=3, device=device)
    grown = p._replace(args=(*p.args[:3], p.args[3] + 1))
    got = run(grown, q, new=(k, v))
    written = [slab.clone() for slab in p.open.slabs.values()]
    seal_triton.append(k, v, p.open.layer(1), p.args[2], p.args[3])
    assert all(torch.equal(a, b) for a, b in zip(written, p.open.slabs.values()))
    want = run(grown, q)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_reads_slabs_in_pinned_host_memory(name, device):
    p = past(by_name(name), [200, 64], S=64, D=128, dtype=torch.bfloat16, device=device)
    q = torch.randn(2, 4, 128, device=device, dtype=torch.bfloat16)
    want, _ = run(p, q)
    host = {i: slab.cpu().pin_memory() for i, slab in p.sealed.slabs.items()}
    for i, slab in host.items():
        p.sealed.base[i] = slab.data_ptr()
    got, _ = run(p, q)
    assert torch.equal(got, want)


def test_refuses_what_it_cannot_read(device):
    p = past(by_name("int8"), [20], D=64, device=device)
    q = torch.randn(1, 4, 64, device=device, dtype=torch.float16)
    with pytest.raises(BadInput, match="head_dim"):
        run(p, q[..., :48].contiguous())
    with pytest.raises(BadInput, match="int32"):
        run(p._replace(args=(p.args[0].long(), *p.args[1:])), q)
    with pytest.raises(BadInput, match="one line per row"):
        run(p._replace(args=(p.args[0][:, None], *p.args[1:])), q)
    with pytest.raises(BadInput, match="has no kernel"):
        run(p._replace(format=KVFormat(Codec(), Codec())), q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "int4"])
def test_replays_follow_lengths_on_the_device(name, device):
    """A captured call takes its ranges from the lengths in device memory."""
    p = past(by_name(name), [700, 300], S=64, D=128, H=8, dtype=torch.bfloat16, device=device)
    q = torch.randn(2, 16, 128, device=device, dtype=torch.bfloat16)
    run(p, q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode.paged_decode(
            q, p.sealed.layer(1), p.format, p.args[0], p.args[1], p.open.layer(1), p.args[2],
            p.args[3], scale=128**-0.5, scratch=SCRATCH,
        )
    for counts in ([10, 4], [3, 1], [0, 2]):
        p.args[1].copy_(torch.tensor(counts))
        graph.replay()
        for b, count in enumerate(counts):
            whole = len(p.keys[b]) // 64 * 64
            keep = [*range(count * 64), *range(whole, len(p.keys[b]))]
            want, want_lse, _ = oracle(q[b], p.keys[b][keep], p.values[b][keep])
            assert relative(out[b], want) < 4e-3
            torch.testing.assert_close(lse[b], want_lse, atol=2e-3, rtol=0)
