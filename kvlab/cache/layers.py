"""The layer groups that a spec asks for: ledger, pool, and who holds which block in each."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kvlab.blocks import Alone, BlockLedger, Ground, Holding, PrefixIndex, Serving, Shared
from kvlab.cache.bytes import GroupBytes
from kvlab.cache.choosing import ChoosingBytes, ChoosingGroup, ChoosingHolding
from kvlab.cache.facts import ModelFacts
from kvlab.cache.group import LayerGroup
from kvlab.cache.lineage import named
from kvlab.cache.spec import CacheSpec, compute_dtype
from kvlab.core import CacheGeometry
from kvlab.format import KVFormat
from kvlab.pool import FINE_SLAB_TOKENS, SLAB_TOKENS, BlockPool, HeadPool, Meter, Workspace
from kvlab.sim.service import recompute_cost
from kvlab.sim.sizes import ModelShape
from kvlab.source import Extent


class Layers:
    """What a cache is made of, layer group by layer group.

    parts: the layers of each group; capacities: its blocks, None without a budget in blocks;
    place: for each layer the number of its group and its place in there. workspace, meter: of all.
    """

    def __init__(
        self, geometry: CacheGeometry, spec: CacheSpec, device, dtype: torch.dtype,
        inv_freq: Tensor | None, facts: ModelFacts,
    ):
        self.geometry, self.inv_freq = geometry, inv_freq
        self.spec = spec.checked_for(geometry)
        self.spec.check_positions(inv_freq)
        if self.spec.caution:
            warnings.warn(self.spec.caution, stacklevel=2)
        self.device, self.dtype = torch.device(device), compute_dtype(dtype)
        self.identity = named(facts.identity, self.spec, self.dtype)  # as the cache is made
        self.shape = ModelShape.of(geometry, facts.parameters)
        self.workspace, self.meter = Workspace(), Meter()
        self.parts = self.spec.layer_groups(geometry)
        self.capacities = self.spec.capacities(geometry)
        made = zip(self.parts, self.spec.formats(geometry), self.capacities)
        self.groups = [self._group(geometry.part(part), *more) for part, *more in made]
        for part, group in zip(self.parts, self.groups) if spec.by_token else ():
            group.watch.of_layers(part, geometry)
        place = {layer: (number, i) for number, part in enumerate(self.parts)
                 for i, layer in enumerate(part)}  # fmt: skip
        self.place = [place[layer] for layer in range(geometry.layers)]

    def _group(self, g: CacheGeometry, format: KVFormat, capacity: int | None) -> LayerGroup:
        spec = self.spec
        # Where tokens are chosen, it is after the step: the ledger has room for the step itself.
        capacity = None if spec.by_token else capacity
        ledger = BlockLedger(capacity, spec.policy())
        kind = HeadPool if spec.budget.by_head else BlockPool
        pool = kind(
            g, format, self.device, self.dtype, spec.kernels, self.workspace, self.meter,
            FINE_SLAB_TOKENS if spec.by_token else SLAB_TOKENS,
        )
        given = ledger, pool, spec, self.inv_freq
        if spec.by_token:
            storage = ChoosingBytes(*given)
            alone = Alone(Ground(ledger, g.block_size, storage))
            return ChoosingGroup(ChoosingHolding(alone, spec.window, Extent), storage)
        storage = GroupBytes(*given)
        sharing, reach = self._sharing(ledger, storage), pool.shape.window
        reach = None if sharing.shares else reach  # others may begin with what leaves it
        pins = spec.member.evicts and not sharing.hold  # who holds blocks has the residual, too
        residual = format.residual if pins else 0
        return LayerGroup(Holding(sharing, spec.window, Extent, reach, residual), storage)

    def _sharing(self, ledger: BlockLedger, storage: GroupBytes) -> Alone:
        """The member of axis prefix at work in a group."""
        spec, size = self.spec, self.geometry.block_size
        ground = Ground(ledger, size, storage)
        if not spec.prefix.shares:
            return Alone(ground)
        if spec.prefix.hold:  # a block is used when a request begins with it
            storage.watch.touches = False
            storage.watch.active &= ledger.policy.scored
        kind = Serving if spec.prefix.hold else Shared
        return kind(
            ground, index=PrefixIndex(self.identity, size),
            tier=spec.offload.tier(storage), cost=recompute_cost(self.shape, size),
            outputs=spec.prefix.outputs, reads_part=spec.retrieval.selects,
        )

    @property
    def allocated_bytes(self) -> int:
        """Every tensor that the groups hold."""
        return sum(group.sources.nbytes + group.watch.nbytes for group in self.groups)
