"""A policy for each ledger, whatever was given: a name, a class, a factory, an instance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

from kvlab import axes
from kvlab.core import BadInput
from kvlab.policy import EvictionPolicy


class Copied:
    """Makes copies of one policy that has served nobody; a policy has state, and no two ledgers may
    share it."""

    def __init__(self, member: EvictionPolicy):
        if member.evicts and (member.capacity is not None or len(member)):
            raise BadInput("policy", member.name, "has served another ledger already; give the "
                           "class, or an instance that nobody has used")
        self.member = member
        self()  # or the first cache would find out

    def __call__(self) -> EvictionPolicy:
        try:
            return copy.deepcopy(self.member)
        except Exception as error:
            raise BadInput("policy", self.member.name, "cannot be copied for each ledger "
                           f"({error}); give the class, or a function that makes one") from error


def maker(given: object) -> Callable[[], EvictionPolicy]:
    """What makes a policy for each ledger. Raises `BadInput` where nothing can."""
    if isinstance(given, str):
        axes.find("policy", given)
        return partial(axes.by_name, "policy", given)
    if isinstance(given, EvictionPolicy):
        return Copied(given)
    if not callable(given):
        raise BadInput("policy", given, REMEDY)
    return given


def made_anew(make: Callable[[], EvictionPolicy]) -> EvictionPolicy:
    """What `make` gives. Raises `BadInput` for no policy, and for one that it gave before."""
    member = make()
    if not isinstance(member, EvictionPolicy):
        raise BadInput("policy", getattr(make, "__name__", make), REMEDY)
    if make() is member:
        raise BadInput("policy", member.name, "comes from a function that gives every ledger the "
                       "same object; give the class, or a function that makes a new one")
    return member


REMEDY = "must be a policy's name, its class, an instance of it or a function that makes one"
