"""The Triton kernels by the names that the rooms above call them."""

from kvlab.kernel.decode_triton import paged_decode
from kvlab.kernel.gather_triton import gather
from kvlab.kernel.merge_triton import merge_into
from kvlab.kernel.seal_triton import append, seal

__all__ = ["append", "gather", "merge_into", "paged_decode", "seal"]
