"""The Triton kernels by the names that the rooms above call them."""

from kvlab.kernel.best_triton import best_of
from kvlab.kernel.decode_triton import paged_decode
from kvlab.kernel.divergence_triton import divergence, surprise
from kvlab.kernel.gather_triton import gather
from kvlab.kernel.merge_triton import merge_into
from kvlab.kernel.move_triton import move
from kvlab.kernel.probe_triton import support
from kvlab.kernel.seal_triton import append, seal, seal_kept, seal_open
from kvlab.kernel.select_triton import choose, score
from kvlab.kernel.shares_triton import token_shares

__all__ = [
    "append", "best_of", "choose", "divergence", "gather", "merge_into", "move", "paged_decode",
    "score", "seal", "seal_kept", "seal_open", "support", "surprise", "token_shares",
]
