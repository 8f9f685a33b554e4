"""Which blocks are read: the kernels agree with their references, the references with sorting."""

import pytest
import torch

from kvlab.format import Plane
from kvlab.kernel import select_ref
from kvlab.pool import SlabStore

select_triton = pytest.importorskip("kvlab.kernel.select_triton")
BOTH = pytest.mark.parametrize("room", [select_ref, select_triton])


def filled(sides, dtype, device, rows=40, heads=2, dim=24):
    """A store of random digests and its contents, [rows, H, C, D]."""
    store = SlabStore({"digest": Plane((heads, sides, dim), dtype)}, 2, 16, device)
    x = torch.randn(rows, heads, sides, dim, device=device).to(dtype)
    if sides == 2:
        x = torch.stack([x.float().amax(2), x.float().amin(2)], 2).to(dtype)
    store.commit(list(range(rows)))
    store.write(1, list(range(rows)), {"digest": x})
    return store.layer(1), x.float()


@BOTH
@pytest.mark.parametrize("group", ["max", "sum"])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_score(room, group, sides, dtype, device):
    if device.type == "cpu" and dtype == torch.float8_e4m3fn and room is select_triton:
        pytest.skip("the interpreter has no fp8")
    planes, x = filled(sides, dtype, device)
    q = torch.randn(3, 6, 24, device=device)
    rows = torch.randperm(40, device=device)[:39].int().view(3, 13).contiguous()
    rows[2, 3] = -1  # a hole
    counts = torch.tensor([13, 0, 7], dtype=torch.int32, device=device)
    got = room.score(q, planes, rows, counts, group=group)
    for b, count in enumerate(counts.tolist()):
        digests = x[rows[b, :count].long()].repeat_interleave(3, 1)  # [n, Hq, C, D]
        want = (q[b, None, :, None] * digests).amax(2).sum(-1).T.unflatten(0, (2, 3))
        want = want.amax(1) if group == "max" else want.sum(1)
        want[:, rows[b, :count] < 0] = -torch.inf
        torch.testing.assert_close(got[b, :, :count], want, atol=2e-5, rtol=1e-5)
        assert (got[b, :, count:] == -torch.inf).all()


def wanted(scores, where, count, keep, first, last):
    """The indices that `choose` takes, by sorting tuples."""
    order = [i for i in range(count) if where[i] != -1]
    order.sort(key=lambda i: ((0, i) if i < first or i >= count - last else (1, -scores[i], i)))
    return sorted(order[:keep])


@BOTH
@pytest.mark.parametrize("n", [1, 13, 70])
@pytest.mark.parametrize("keep", [1, 5, 100])
@pytest.mark.parametrize("ends", [(0, 0), (1, 3)])
def test_choose(room, n, keep, ends, device):
    first, last = ends
    scores = torch.randint(-4, 4, (3, 2, n), device=device).float()  # many ties
    where = torch.randperm(3 * n, device=device).int().view(3, n).contiguous()
    where[0, ::3] = -1  # holes
    where[1, 1::2] = -2 - where[1, 1::2]  # blocks on the host
    counts = torch.tensor([n, n, n // 2], dtype=torch.int32, device=device)
    hits = torch.zeros(3, n, dtype=torch.int32, device=device)
    got = room.choose(scores, where, counts, keep=keep, first=first, last=last, hits=hits)
    assert got.device.shape == got.host.shape == (3, 2, keep)
    total = torch.zeros_like(hits)
    for b in range(3):
        for h in range(2):
            take = wanted(scores[b, h].tolist(), where[b].tolist(), int(counts[b]), keep, *ends)
            places = [int(where[b, i]) for i in take]
            total[b, take] += 1
            for table, count, want in (
                (got.device, got.n_device, [p for p in places if p >= 0]),
                (got.host, got.n_host, [-2 - p for p in places if p < -1]),
            ):
                assert table[b, h, : int(count[b, h])].tolist() == want
                assert not table[b, h, int(count[b, h]) :].any()
    assert torch.equal(hits, total)


@BOTH
def test_one_choice_for_all_heads(room, device):
    scores = torch.randn(2, 1, 20, device=device).expand(2, 4, 20)
    where = torch.arange(40, dtype=torch.int32, device=device).view(2, 20)
    counts = torch.tensor([20, 20], dtype=torch.int32, device=device)
    got = room.choose(scores, where, counts, keep=6)
    assert torch.equal(got.device, got.device[:, :1].expand_as(got.device))
