"""Copies of a whole cache: `copy.deepcopy` makes an independent one, anything less is refused."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import torch

from kvlab.core import KvlabError


class Copies:
    """The part of `PagedCache` that copies itself.

    A deep copy holds the same tokens in memory of its own, and evicts and shares for itself. The
    model, the axes and the host memory behind an offload are not copied. Pinned prefixes stay
    pinned: `copy.deepcopy((cache, handle))` gives the handle that releases them in the copy.
    """

    def __deepcopy__(self, memo: dict):
        """Raises `KvlabError` within a step, `OutOfHost` where an offload's limit leaves no room
        for a second copy, and what the allocator raises; this cache is as it was then."""
        self.sequences.between_steps("copied")
        self.requests.catch_up()
        for constant in _constants(self):
            memo[id(constant)] = constant
        with torch.inference_mode(False), torch.no_grad():  # who writes later may be in any mode
            return rebuilt(self, memo)

    def __copy__(self):
        raise KvlabError("two shallow copies of a PagedCache would write to the same blocks; "
                         "take copy.deepcopy(cache)")

    def __reduce_ex__(self, protocol):
        raise KvlabError("a PagedCache cannot be pickled, since kernels address its memory; take "
                         "copy.deepcopy(cache) for a second one, or prefix=hash and "
                         "cache.save(folder) for another process")


def rebuilt(old, memo: dict):
    """A deep copy of `old` to which the copies of its parts refer weakly, as they do to `old`."""
    new, proxy = object.__new__(type(old)), weakref.proxy(old)
    memo[id(old)], memo[id(proxy)] = new, weakref.proxy(new)
    memo.setdefault(id(memo), []).append(proxy)  # or another object may get its id
    vars(new).update({name: copy.deepcopy(value, memo) for name, value in vars(old).items()})
    return new


def _constants(cache) -> Iterator[object]:
    """What a copy shares with its original: nobody writes to it, or it is the model's."""
    yield from (cache.spec, *vars(cache.spec).values(), cache.geometry, cache.lineage.facts)
    yield from (group.pool.fused for group in cache.groups)
    yield from (value for value in vars(cache).values() if isinstance(value, torch.nn.Module))
