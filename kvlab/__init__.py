"""kvlab: a laboratory bench for the KV cache of language models.

Names are loaded on first use, so that the simulator half (`kvlab.sim`, `kvlab.policy`,
`kvlab.blocks`) runs where torch is not installed.
"""

from importlib import import_module

__version__ = "0.1.0"
_HOME = {"PagedCache": "kvlab.model", "prefill": "kvlab.model"}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kvlab' has no attribute {name!r}")
