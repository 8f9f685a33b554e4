"""Moved rows are the same bytes, whatever the two layouts."""

import pytest
import torch

from kvlab.core import CacheGeometry
from kvlab.format import by_name
from kvlab.offload.memory import HostMemory
from kvlab.offload.slabs import HostSlabs
from kvlab.pool import SlabStore

move = pytest.importorskip("kvlab.kernel.move_triton").move
LAYERS = 3


@pytest.mark.parametrize("name, slots", [("fp8", 16), ("int3", 7), ("int4", 5), ("bf16", 3)])
@pytest.mark.parametrize("layers", [[0, 1, 2], [1]])
def test_rows_arrive_and_their_neighbours_stay(name, slots, layers, device):
    planes = by_name(name).planes(CacheGeometry(LAYERS, 4, 2, 32, slots))
    here = SlabStore(planes, LAYERS, 4, device)
    there = HostSlabs(planes, LAYERS, 3, device, HostMemory())
    for store, rows in ((here, 12), (there, 9)):
        store.commit(list(range(rows)))
        for slab in store.slabs.values():
            slab.copy_(torch.randint(0, 255, slab.shape, dtype=torch.uint8))
    sources, targets = [3, 4, 11, 0], [8, 0, 1, 5]
    before = [there.read(layer, list(range(9))) for layer in range(LAYERS)]
    ids = (torch.tensor(x, device=device) for x in (sources, targets))
    move([here.layer(n) for n in layers], [there.layer(n) for n in layers], *ids)
    for layer in range(LAYERS):
        for source, target in zip(sources, targets):
            if layer in layers:
                before[layer] = {n: x.clone() for n, x in before[layer].items()}
                for plane, x in here.row(layer, source).items():
                    before[layer][plane][target] = x
        after = there.read(layer, list(range(9)))
        assert all(torch.equal(after[n].view(torch.uint8).cpu(), x.view(torch.uint8).cpu())
                   for n, x in before[layer].items())  # fmt: skip
