"""Which policy object is compiled by which module, and the loops bound to it."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np

from kvlab import policy as objects
from kvlab.sim.compiled import (
    admission,
    admit_cost,
    admit_reuse,
    arc,
    behind,
    belady,
    classes,
    cost_gdsf,
    fifo,
    flat,
    gdsf,
    keep_until_return,
    leaves,
    lfu,
    lru,
    mq,
    none,
    odds,
    priority,
    random,
    request,
    s3fifo,
    sieve,
    sinks,
    stacked,
    ttl,
    verbs,
    wa_lru,
    worth,
)  # fmt: skip
from kvlab.sim.compiled import refill as refills
from kvlab.sim.compiled.bind import bind, module_of
from kvlab.sim.compiled.state import CHILDREN, OWN, State, new_state, with_door

# Where a request touches each block once, as here, LFU by requests is LFU.
MODULES: dict[type, ModuleType] = {
    objects.FIFO: fifo, objects.LRU: lru, objects.LFU: lfu, objects.RequestLFU: lfu,
    objects.Random: random, objects.Priority: priority, objects.ARC: arc,
    objects.RequestARC: arc, objects.MQ: mq, objects.SIEVE: sieve, objects.S3FIFO: s3fifo,
    objects.GDSF: gdsf, objects.Belady: belady, objects.TTL: ttl, objects.WALRU: wa_lru,
    objects.KeepUntilReturn: keep_until_return, objects.NoEviction: none,
}  # fmt: skip
INNER = {objects.PGDSF: cost_gdsf, objects.Hybrid: worth, objects.Learned: odds}  # by leaves
DOORS = {objects.AdmitCost: admit_cost, objects.AdmitReuse: admit_reuse}
BY_BIRTH = (objects.FIFO, objects.RequestLFU)  # what waited at a door goes where it was born
BY_CLASS = (wa_lru, odds)


class Made(NamedTuple):
    """Verbs of a policy and the object that has its parameters."""

    verbs: ModuleType
    policy: objects.EvictionPolicy

    def state(self, capacity: int) -> State:
        does = self.verbs
        rows = does.ROWS[0] * capacity + does.ROWS[1]
        state = new_state(capacity, does.WIDTH, rows, does.ORDER, does.NOTES)
        if does.DOOR_WIDTH:
            state = with_door(state, new_state(capacity, does.DOOR_WIDTH))
        does.prepare(state, self.policy)
        return state

    def draws(self) -> np.random.Generator | None:
        """A generator of what a Random object draws; None for other policies."""
        policy = innermost(self.policy)
        if not isinstance(policy, objects.Random):
            return None
        *key, position = policy.generator_state()
        bits = np.random.MT19937()
        bits.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": position}}
        return np.random.Generator(bits)


def made(policy: objects.EvictionPolicy) -> Made | None:
    """How this policy is compiled; None if it is not."""
    found = _found(policy)
    return found and Made(found, policy)


def _found(policy: objects.EvictionPolicy) -> ModuleType | None:
    kind = type(policy)
    if kind in MODULES:
        return _verbs(MODULES[kind])
    if kind in INNER:
        return _by_leaves(_verbs(INNER[kind]))
    if kind not in (objects.LeafFirst, *DOORS) or policy.member.foresees:
        return None
    member = _found(policy.member)
    if member is None or kind is objects.LeafFirst:
        return member and _by_leaves(member)
    fits = not member.DOOR_WIDTH and type(innermost(policy)) not in BY_BIRTH
    return _behind_door(DOORS[kind], member) if fits else None


def innermost(policy: objects.EvictionPolicy) -> objects.EvictionPolicy:
    while hasattr(policy, "member"):
        policy = policy.member
    return policy


@cache
def _verbs(module: ModuleType) -> ModuleType:
    name = module.__name__.rpartition(".")[2]
    says = {**vars(verbs), **vars(module)}
    if module in BY_CLASS:
        w = module_of(name, says)

        def prepare(state, policy):
            classes.ends(state, w.COUNT)
            w.prepare(state, policy)

        says = says | bind(classes, name, w=w) | {"prepare": prepare}
    return module_of(name, says)


def _over(template: ModuleType, label: str, member: ModuleType, names: dict, **says) -> ModuleType:
    """The verbs of a template over those of a member; what the template has not does nothing."""
    bound = bind(template, f"{label}_{member.__name__}", m=member, **names)
    kept = {name: getattr(member, name) for name in verbs.SAYS}
    return module_of(f"{label}_{member.__name__}", {**vars(verbs), **bound, **kept, **says})


@cache
def _by_leaves(member: ModuleType) -> ModuleType:
    return _over(
        leaves, "leaves", member, {}, WIDTH=max(member.WIDTH, CHILDREN + 1),
        prepare=lambda state, policy: member.prepare(state, policy.member),
    )  # fmt: skip


@cache
def _behind_door(rule: ModuleType, member: ModuleType) -> ModuleType:
    label = rule.__name__.rpartition(".")[2]

    def prepare(state, policy):
        member.prepare(state, policy.member)
        rule.prepare(state.door, policy)
        state.door.key[OWN] = policy.door

    return _over(
        admission, label, member, {"w": rule}, DOOR_WIDTH=rule.DOOR_WIDTH, COUNTS=False,
        prepare=prepare,
    )


def requests(device: ModuleType, *tiers: tuple[ModuleType, str]):
    """The compiled loop over requests for verbs of the device and (verbs, mode) of the tiers behind
    it, the nearest first."""
    return _requests(device, tiers)


@cache
def _requests(device: ModuleType, tiers: tuple):
    labels = [device.__name__, *(f"{host.__name__}_{mode}" for host, mode in tiers)]
    behind_it = _tiers(tiers)
    return bind(request, "_".join(labels), "replay", p=device, b=behind_it)["replay"]


def _tiers(tiers: tuple) -> ModuleType:
    if not tiers:
        return _tier(bind(behind, "none"), "none")
    *_, (host, mode) = tiers
    last = _tier(bind(behind, host.__name__, p=host, g=_sinks(sinks.GONE, "gone")), mode)
    if len(tiers) == 1:
        return last
    host, mode = tiers[0]
    down = _sinks(sinks.DOWN, last.__name__, left=last.left)
    upper = _tier(bind(behind, f"upper_{host.__name__}", p=host, g=down), mode)
    both = bind(stacked, f"{upper.__name__}_{last.__name__}", u=upper, l=last)
    return module_of("stacked", both)


def _tier(bound: dict, mode: str) -> ModuleType:
    names = {name: bound[does] for name, does in behind.MODES[mode].items()}
    return module_of(mode, names)


def _sinks(which: dict, label: str, **names) -> ModuleType:
    bound = bind(sinks, label, **names)
    return module_of(label, {name: bound[does] for name, does in which.items()})


@cache
def refill(verbs: ModuleType):
    """The compiled loop that tells a new leader of the blocks that are there."""
    return bind(refills, verbs.__name__, "refill", p=verbs)["refill"]


@cache
def accesses(device: ModuleType):
    """The compiled loop over single accesses."""
    return bind(flat, device.__name__, "replay", p=device)["replay"]
