"""The bytes behind block ids."""

from kvlab.pool.apart import Apart, away
from kvlab.pool.blocks import (
    FINE_SLAB_TOKENS,
    SLAB_TOKENS,
    BlockPool,
    fused_kernels,
    no_kernels,
)
from kvlab.pool.coming import Coming, Here, lane_for
from kvlab.pool.heads import HeadPool
from kvlab.pool.slabs import ALIGNMENT, MAX_SLABS, LayerPlanes, Meter, PlaneView, SlabStore
from kvlab.pool.workspace import Workspace

__all__ = [
    "ALIGNMENT", "FINE_SLAB_TOKENS", "MAX_SLABS", "SLAB_TOKENS", "Apart", "BlockPool", "Coming",
    "HeadPool", "Here", "LayerPlanes", "Meter", "PlaneView", "SlabStore", "Workspace", "away",
    "fused_kernels", "lane_for", "no_kernels",
]  # fmt: skip
