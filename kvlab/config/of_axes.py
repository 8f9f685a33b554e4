"""What the table of axes says of the configuration; `conf/` refers to it by name.

`axes`: the null member of each axis as the default of its group. `cache_axes`: what a cache takes
from those groups.
"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from kvlab.axes import AXES, TABLE

_NULLS = {"defaults": [{axis: TABLE[axis].null} for axis in AXES]}
_TAKEN = {axis: f"${{{axis}}}" for axis in AXES}
ConfigStore.instance().store("axes", _NULLS, package="_global_")
ConfigStore.instance().store("cache_axes", _TAKEN)
