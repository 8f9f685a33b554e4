"""Which policy object is compiled by which module, and the loops bound to it."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np

from kvlab import policy as objects
from kvlab.sim.compiled import (
    arc,
    behind,
    belady,
    cost_gdsf,
    fifo,
    flat,
    gdsf,
    leaves,
    lfu,
    lru,
    mq,
    priority,
    random,
    request,
    s3fifo,
    sieve,
    verbs,
    worth,
)  # fmt: skip
from kvlab.sim.compiled.bind import bind, module_of
from kvlab.sim.compiled.state import CHILDREN, State, new_state

MODULES: dict[type, ModuleType] = {
    objects.FIFO: fifo, objects.LRU: lru, objects.LFU: lfu, objects.Random: random,
    objects.Priority: priority, objects.ARC: arc, objects.MQ: mq, objects.SIEVE: sieve,
    objects.S3FIFO: s3fifo, objects.GDSF: gdsf, objects.Belady: belady,
}  # fmt: skip
BY_LEAVES = {objects.LeafFirst: None, objects.PGDSF: cost_gdsf, objects.Hybrid: worth}


class Made(NamedTuple):
    """Verbs of a policy and the object that has its parameters."""

    verbs: ModuleType
    policy: objects.EvictionPolicy

    @property
    def label(self) -> str:
        return self.verbs.__name__

    def state(self, capacity: int) -> State:
        rows = self.verbs.ROWS[0] * capacity + self.verbs.ROWS[1]
        state = new_state(capacity, self.verbs.WIDTH, rows, self.verbs.ORDER)
        self.verbs.prepare(state, self.policy)
        return state

    def draws(self) -> np.random.Generator | None:
        """A generator of what a Random object draws; None for other policies."""
        policy = self.policy.member if type(self.policy) in BY_LEAVES else self.policy
        if not isinstance(policy, objects.Random):
            return None
        *key, position = policy.generator_state()
        bits = np.random.MT19937()
        bits.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": position}}
        return np.random.Generator(bits)


def made(policy: objects.EvictionPolicy) -> Made | None:
    """How this policy is compiled; None if it is not."""
    if type(policy) in BY_LEAVES:
        module = BY_LEAVES[type(policy)] or MODULES.get(type(policy.member))
        return module and Made(_by_leaves(module), policy)
    module = MODULES.get(type(policy))
    return module and Made(_verbs(module), policy)


@cache
def _verbs(module: ModuleType) -> ModuleType:
    return module_of(module.__name__.rpartition(".")[2], {**vars(verbs), **vars(module)})


@cache
def _by_leaves(module: ModuleType) -> ModuleType:
    member = _verbs(module)
    bound = bind(leaves, member.__name__, m=member)
    says = {name: getattr(member, name) for name in verbs.SAYS}
    says["WIDTH"] = max(says["WIDTH"], CHILDREN + 1)
    says["ORDERED"] = True  # of equally deep ones that wait for each other
    prepare = {"prepare": lambda state, policy: member.prepare(state, policy.member)}
    return module_of(f"leaves_{member.__name__}", {**bound, **says, **prepare})


@cache
def requests(device: ModuleType, host: ModuleType | None, mode: str):
    """The compiled loop over requests for verbs of the device and of a host tier, or none."""
    label = f"{device.__name__}_{host.__name__}_{mode}" if host else device.__name__
    bound = bind(behind, host.__name__, p=host) if host else bind(behind, "none")
    tier = module_of(mode, {name: bound[does] for name, does in behind.MODES[mode].items()})
    return bind(request, label, "replay", p=device, b=tier)["replay"]


@cache
def accesses(device: ModuleType):
    """The compiled loop over single accesses."""
    return bind(flat, device.__name__, "replay", p=device)["replay"]
