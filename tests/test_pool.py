"""Slabs: committed lazily, never moved, dropped with their last row."""

from __future__ import annotations

import pytest
import torch

from kvlab.core import CacheGeometry, KvlabError
from kvlab.format import NAMES, Plane, by_name
from kvlab.pool import ALIGNMENT, MAX_SLABS, BlockPool, Meter, SlabStore

PLANES = {"data": Plane((2, 3, 4), torch.float32), "scale": Plane((2, 3), torch.float16)}
ROWS, LAYERS = 4, 3


@pytest.fixture
def store():
    return SlabStore(PLANES, LAYERS, ROWS, "cpu")


def values(rows: list[int]) -> dict[str, torch.Tensor]:
    """Recognizable contents: row r holds r in every plane."""
    marks = torch.tensor(rows, dtype=torch.float32)
    return {
        name: marks.view(-1, *[1] * len(p.shape)).expand(-1, *p.shape).to(p.dtype)
        for name, p in PLANES.items()
    }


def tensor_bytes(store: SlabStore) -> int:
    return sum(slab.untyped_storage().nbytes() for slab in store.slabs.values())


def test_nothing_is_reserved_up_front(store):
    assert store.nbytes == 0 and not store.slabs and store.live_rows == 0


def test_slabs_come_with_the_first_row_and_go_with_the_last(store):
    store.commit([1, 2])
    assert list(store.slabs) == [0] and store.nbytes == tensor_bytes(store) == store.slab_bytes
    store.commit([9])
    assert sorted(store.slabs) == [0, 2] and store.nbytes == 2 * store.slab_bytes
    store.drop([1])
    assert store.nbytes == 2 * store.slab_bytes and store.live_rows == 2
    store.drop([2, 9, 9, 100])  # twice, and one that was never there
    assert store.nbytes == tensor_bytes(store) == 0


def test_a_meter_sums_over_stores_and_keeps_the_peak():
    meter = Meter()
    stores = [SlabStore(PLANES, LAYERS, ROWS, "cpu", meter) for _ in range(2)]
    size = stores[0].slab_bytes
    stores[0].commit([0, 1, 9])
    stores[0].drop([9])
    stores[1].commit([0])
    assert (meter.now, meter.peak) == (2 * size, 2 * size), "not three: never at one time"
    table = stores[1].base.nbytes
    assert meter.now == meter.peak == sum(s.nbytes for s in stores) == 2 * size + table
    stores[0].drop([0, 1])
    meter.reset_peak()
    assert meter.now == meter.peak == size + table
    with pytest.raises(KvlabError, match="block_size"):
        stores[0].commit([MAX_SLABS * ROWS])
    assert meter.now == meter.peak == size + table, "what was refused is not counted"


def test_a_slab_is_no_larger_than_its_planes_and_their_alignment(store):
    exact = LAYERS * ROWS * sum(p.nbytes for p in PLANES.values())
    assert exact <= store.slab_bytes < exact + len(PLANES) * ALIGNMENT
    assert store.slab_bytes % ALIGNMENT == 0


def test_growing_never_moves_a_slab(store):
    store.commit([0])
    store.write(1, [0], values([7]))
    before = store.slabs[0].data_ptr()
    for row in range(1, 40):
        store.commit([row])
    assert store.slabs[0].data_ptr() == before
    assert (store.read(1, [0])["data"] == 7).all()


@pytest.mark.parametrize("rows", [[5], [0, 1, 2, 3], [3, 2, 1, 0], [11, 0, 5, 4, 6, 1], [8, 0, 9]])
def test_read_gives_what_was_written_in_any_order(store, rows):
    store.commit(list(range(12)))
    for layer in range(LAYERS):
        store.write(layer, rows, {n: v + layer for n, v in values(rows).items()})
    for layer in range(LAYERS):
        for order in (rows, rows[::-1]):
            read = store.read(layer, order)
            assert all(
                torch.equal(read[n], (v + layer).to(v.dtype)) for n, v in values(order).items()
            )


def test_base_table_follows_the_slabs_in_place(store):
    store.commit([0, 9])
    address = store.base.data_ptr()
    assert store.base[0] == store.slabs[0].data_ptr() and store.base[2] == store.slabs[2].data_ptr()
    assert store.base.nbytes == 8 * MAX_SLABS
    assert store.nbytes == 2 * store.slab_bytes + store.base.nbytes
    store.commit([5])
    assert store.base[1] == store.slabs[1].data_ptr()
    store.drop([9])
    assert store.base[2] == 0 and store.base.data_ptr() == address
    assert torch.count_nonzero(store.base) == 2


def test_layer_planes_lead_to_the_bytes(store):
    """Address arithmetic as a kernel does it, on the raw bytes of the slab."""
    rows = list(range(8))
    store.commit(rows)
    for layer in range(LAYERS):
        store.write(layer, rows, {n: v + 10 * layer for n, v in values(rows).items()})
        at = store.layer(layer)
        for name, view in at.planes.items():
            for row in rows:
                start = view.offset_bytes + row % at.slab_blocks * view.block_stride_bytes
                raw = at.slabs[row // at.slab_blocks][start : start + view.block_stride_bytes]
                assert (raw.view(view.dtype) == row + 10 * layer).all(), name
            assert view.offset_bytes % view.dtype.itemsize == 0


def test_too_many_slabs_are_refused(store):
    with pytest.raises(KvlabError, match="block_size"):
        store.commit([MAX_SLABS * ROWS])
    assert store.nbytes == 0
    table = store.base.nbytes  # which kernels read, and a refused slab has no place in
    with pytest.raises(KvlabError, match="block_size"):
        store.commit([0, MAX_SLABS * ROWS])
    store.drop([0, MAX_SLABS * ROWS])
    assert store.nbytes == table and not store.base.any()


def pool(name="fp32", slots=8, device="cpu") -> BlockPool:
    return BlockPool(CacheGeometry(2, 4, 2, 32, slots), by_name(name), device, torch.float32)


def tokens(count: int, device="cpu"):
    return (torch.randn(count, 2, 32, device=device) for _ in range(2))


@pytest.mark.parametrize("name", NAMES)
def test_sealed_blocks_read_as_the_format_says(name):
    p = pool(name)
    k, v = tokens(3 * 8)
    p.seal(1, [300, 2, 1], k, v)
    blocks = [x.view(3, 8, 2, 32) for x in (k, v)]
    expected = p.format.dequantize(p.format.quantize(*blocks), torch.float32)
    for order in ([0, 1, 2], [2, 1, 0], [1]):
        read = p.read(1, [[300, 2, 1][i] for i in order])
        for got, want in zip(read, expected):
            assert torch.equal(got, want[order].flatten(0, 1))


def test_open_blocks_collect_tokens_and_give_their_bytes_back():
    p = pool()
    assert p.nbytes == 0
    for block in (5, 6):
        p.open_block(block)
    k, v = tokens(8)
    p.write(1, 5, 0, k[:3], v[:3])
    p.write(1, 6, 0, k[:1], v[:1])
    p.write(1, 5, 3, k[3:5], v[3:5])
    assert [torch.equal(a, b) for a, b in zip(p.read_open(1, 5, 5), (k[:5], v[:5]))] == [True] * 2
    assert torch.equal(p.read_open(1, 6, 1)[0], k[:1])
    assert p.nbytes == p.open.nbytes == tensor_bytes(p.open) > 0
    p.close_block(5)
    p.open_block(7)
    assert p.open_row(7) == 0, "the lowest places are used again"
    p.drop([6, 7])
    assert p.nbytes == 0


def test_dropping_sealed_blocks_returns_their_slabs():
    p = pool(slots=256)  # 4 blocks a slab
    k, v = tokens(256 * 6)
    p.seal(0, list(range(6)), k, v)
    full = p.nbytes
    p.drop([0, 1, 2])
    assert p.nbytes == full
    p.drop([3])
    assert p.nbytes == full / 2 == p.sealed.slab_bytes
    p.drop([4, 5])
    assert p.nbytes == 0


@pytest.mark.parametrize(("dim", "fits"), [(32, True), (128, True), (96, False), (16, False)])
def test_shapes_without_kernels_go_through_torch(dim, fits):
    pytest.importorskip("triton")
    g = CacheGeometry(1, 2, 1, dim, 16)
    pool = BlockPool(g, by_name("int8"), "cpu", torch.float32, kernels="triton")
    assert (pool.fused is not None) is fits
