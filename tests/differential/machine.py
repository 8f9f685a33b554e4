"""Two models with the same weights, one under the library's attention, one switched to ours."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache

from kvlab import PagedCache

from . import compare
from .calls import prepare
from .compare import Tie, Undefined, Unequal, Verdict
from .models import STATEFUL_ROPE, build, library_cache, paged_cache, windows
from .programs import BASELINE, NO_CACHE, Copy, Program, Setup


def cache_argument(model) -> str:
    """What the library calls the cache in a forward."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def snapshot(cache: Cache) -> Cache:
    """A copy of a cache of the library, cut off the graph that made it."""
    clone = copy.copy(cache)
    clone.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in clone.layers:
        tensors = {k: v.detach().clone() for k, v in vars(layer).items() if torch.is_tensor(v)}
        vars(layer).update(tensors)
    return clone


class Side:
    """A model and its caches by slot; `make` gives an empty cache for a slot."""

    def __init__(self, setup: Setup, model, kind: str):
        self.setup, self.model, self.kind = setup, model, kind
        self.caches: dict[int, Cache] = {}
        self.name = "past_key_values" if setup.old_name else cache_argument(model)

    def make(self, slot: int) -> Cache:
        if slot == BASELINE:
            return library_cache("dynamic", self.model)
        if self.kind == "paged":
            return paged_cache(self.setup, self.model)
        return library_cache(self.kind, self.model)

    def with_cache(self, slot: int, inputs: dict) -> dict:
        """`inputs` and the cache of `slot`, which is made where there is none."""
        if slot == NO_CACHE:
            return inputs
        if slot not in self.caches:
            self.caches[slot] = self.make(slot)
        return inputs | {self.name: self.caches[slot]}

    def length(self, slot: int) -> int:
        return int(self.caches[slot].get_seq_length()) if slot in self.caches else 0

    def forget(self, slot: int, finish: bool) -> None:
        if not isinstance(self.caches[slot], PagedCache):
            del self.caches[slot]
        elif finish:
            self.caches[slot].finish()
        else:
            self.caches[slot].reset()

    def switch(self, attention: str) -> None:
        if self.is_subject:
            self.model.set_attn_implementation(attention)

    def faults(self) -> str:
        """What is wrong inside the caches, or nothing."""
        return ""

    leaks = faults
    is_subject = False


class Subject(Side):
    is_subject = True

    def __init__(self, setup: Setup):
        super().__init__(setup, build(setup.model), setup.cache)
        PagedCache.for_model(self.model)  # baselines run on a switched model too

    def faults(self) -> str:
        """What is wrong inside the caches, or nothing."""
        for slot, cache in self.caches.items():
            if isinstance(cache, PagedCache):
                try:
                    cache.check()
                except Exception as error:
                    return f"check() of slot {slot}: {compare.told(error)}"
        return ""

    def leaks(self) -> str:
        """What caches still hold when their requests have ended, or nothing."""
        for slot, cache in self.caches.items():
            if isinstance(cache, PagedCache):
                cache.finish()
                held = cache.stats().blocks
                if held and self.setup.prefix == "none":
                    return f"slot {slot} holds {held} blocks after finish()"
        return self.faults()


class Step(NamedTuple):
    op: object
    verdict: Verdict


class Machine:
    """Runs a program on both sides, op by op."""

    def __init__(self, setup: Setup, subject: Side | None = None):
        self.setup = setup
        kind = "dynamic" if setup.cache == "paged" else setup.cache
        self.reference = Side(setup, build(setup.model, setup.attention), kind)
        self.subject = subject or Subject(setup)
        self.columns: dict[int, object] = {}
        self.heads = self.reference.model.config.num_attention_heads
        self.windows = windows(self.reference.model)

    def own(self, slot: int) -> bool:
        """Whether the slot holds a cache of ours."""
        return self.setup.cache == "paged" and slot in (0, 1)

    def step(self, op) -> tuple[Verdict, bool]:
        """The verdict, and whether the program goes on."""
        action = prepare(op, self)
        if action is None:
            return Verdict("skipped"), True
        saved = {slot: snapshot(cache) for slot, cache in self.reference.caches.items()}
        want, got = (_attempt(action.run, side) for side in (self.reference, self.subject))
        if isinstance(want, Exception):
            return Verdict("library", compare.reason(want)), False
        if isinstance(got, Exception):
            return self._refusal(op, got, saved)
        return self._answer(op, action, want, got)

    def _refusal(self, op, error: Exception, saved: dict) -> tuple[Verdict, bool]:
        if not compare.refused(error):
            return Verdict("raised", compare.told(error)), False
        fault = self.subject.faults()
        if fault:
            return Verdict("state", f"after a refusal ({error}): {fault}"), False
        self.reference.caches = saved
        known = [slot for slot in self.columns if self.columns[slot] is not None]
        kept = all(self.subject.length(s) == self.reference.length(s) for s in known)
        fresh = getattr(op, "slot", 0)
        kept = kept and (fresh in known or self.subject.length(fresh) == 0)
        return (
            Verdict("refused", compare.reason(error)),
            kept and self.setup.model not in STATEFUL_ROPE,
        )

    def _answer(self, op, action, want, got) -> tuple[Verdict, bool]:
        try:
            action.compare(want, got)
        except Unequal as error:
            return Verdict("differs", str(error)), False
        except Undefined as error:
            return Verdict("undefined", str(error)), False
        except Tie:
            return Verdict("tie"), False
        if any(self.reference.length(slot) < 0 for slot in self.reference.caches):
            return Verdict("undefined", "the library's cache is shorter than nothing"), False
        if action.last(want):
            return Verdict("equal"), False
        self.columns |= action.settle(want)
        slot = op.to if isinstance(op, Copy) else getattr(op, "slot", 0)
        lengths = [side.length(slot) for side in (self.reference, self.subject)]
        if lengths[0] != lengths[1]:
            text = f"get_seq_length() is {lengths[1]}, the library's {lengths[0]}"
            return Verdict("state", text), False
        fault = self.subject.faults()
        return (Verdict("state", fault), False) if fault else (Verdict("equal"), True)


def _attempt(run, side: Side):
    """Its result, or the exception itself."""
    try:
        return run(side)
    except Exception as error:
        return error


def execute(program: Program, subject: Side | None = None) -> list[Step]:
    """Each operation that ran and its verdict; ends at the first that cannot be gone on from.

    subject: whom to compare with the library, instead of what the program's setup names.
    """
    steps = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        machine = Machine(program.setup, subject)
        for op in program.ops:
            verdict, alive = machine.step(op)
            steps.append(Step(op, verdict))
            if not alive:
                return steps
        leak = _attempt(lambda side: side.leaks(), machine.subject)
        if isinstance(leak, Exception):
            leak = f"finish(): {compare.told(leak)}"
        if leak:
            steps.append(Step(None, Verdict("state", leak)))
    return steps


def failure(program: Program) -> Verdict | None:
    """The first verdict that is neither equal nor refused, or None."""
    return next((step.verdict for step in execute(program) if step.verdict.failed), None)
