"""Negative controls: what a compressed cache has to beat before its policy deserves any credit.

Each variant that evicts under a budget gets three companions of the same bytes:

    random      the same in all, but any evictable block (or token of a head) may leave
    shuffled    the same policy, its scores dealt to other blocks (`policy.Shuffled`); only where
                a policy scores blocks by attention or contents
    window      no choice at all: four sinks, and the newest tokens that the budget has room for

A bare window (no policy) is compared with random eviction under a budget of the window's peak: its
blocks and a prefill chunk. So each chunk sees as many tokens of the past, while decoding sees more
of them under random eviction. The window's own sinks stay in both: a real model without its first
tokens loses more than by all that a window leaves out, and the recent ones are what is asked about.
Retrieval is compared with a choice by chance and with a window of as many tokens as it reads. What
is evicted to the host is not lost and needs no control. Controls of several variants that come out
equal are run once. They are not timed.

Members are asked what they are (`scored`, `control`, `selects`, `keeps`), so one from outside the
package gets its controls like one of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kvlab import policy as policies
from kvlab.axes import alike
from kvlab.budget import Equal, by_name
from kvlab.cache import CacheSpec
from kvlab.core import Variant
from kvlab.policy import FIFO, EvictionPolicy, Random
from kvlab.retrieval import NoRetrieval, RandomChoice
from kvlab.window import SinkWindow

SINKS = 4  # tokens; what StreamingLLM needs, https://arxiv.org/abs/2309.17453
LONG = 1 << 40  # tokens: longer than any window


def controls(variants: list[Variant], chunk_tokens: int) -> list[Variant]:
    """The controls of all `variants`, without those that are among the variants already."""
    known = {_key(v.spec) for v in variants}
    found = []
    for variant in variants:
        for control in _of(variant, chunk_tokens):
            key = _key(control.spec)
            if key not in known:
                known.add(key)
                found.append(control)
    return found


def companions(runners: list, chunk_tokens: int) -> Iterator[tuple]:
    """(runner, kind, control) of each variant and each control of its that runs beside it.

    A control is found by what it is, not by its name: `fifo` with sinks is the window of another
    variant. kind: random, shuffled, window or chance.
    """
    known = {}
    for runner in runners:
        known.setdefault(_key(runner.spec), runner)
    for runner in runners:
        if runner.params.get("control") or runner.params.get("baseline"):
            continue
        for control in _of(Variant(runner.name, runner.params, runner.spec), chunk_tokens):
            other = known.get(_key(control.spec), runner)
            if other is not runner:
                yield runner, control.name.partition(" ")[0], other


def _of(variant: Variant, chunk_tokens: int) -> Iterator[Variant]:
    spec = variant.spec
    member = spec.member
    if spec.retrieval.selects and not spec.retrieval.control:
        yield from _of_retrieval(variant)
    if not member.evicts and not spec.window.middle:
        blocks = _peak_blocks(spec, chunk_tokens)
        head = spec.window.protected(LONG)[0][1] if _keeps_head(spec.window) else 0
        loose = SinkWindow(head, 1, middle=True)
        bare = replace(spec, window=loose, policy=Random, budget_blocks=blocks)
        yield _control(variant, "random", f"random eviction, {blocks} blocks", bare)
    elif spec.bounded and member.evicts and not member.control and not spec.offload.keeps:
        yield from _of_policy(variant, member)


def _of_retrieval(variant: Variant) -> Iterator[Variant]:
    spec, member = variant.spec, variant.spec.retrieval
    chance = RandomChoice(
        member.budget_tokens, member.sinks, member.recent, member.group, member.per_head,
        member.digests,
    )
    yield _control(variant, "chance", "blocks read by chance", replace(spec, retrieval=chance))
    if spec.bounded or not spec.window.middle:
        return
    recent = max(1, member.budget_tokens - member.sinks)
    window = SinkWindow(member.sinks, recent, middle=False)
    spec = replace(spec, retrieval=NoRetrieval(), window=window)
    yield _control(variant, "window", "the newest tokens, as many as retrieval reads", spec)


def _of_policy(variant: Variant, member: EvictionPolicy) -> Iterator[Variant]:
    spec = variant.spec
    chance = replace(spec, policy=Random, budget="equal" if spec.budget.across else spec.budget)
    yield _control(variant, "random", "random eviction", chance)
    if member.scored and not spec.by_token:  # of tokens, dealt scores are drawn ones
        shuffled = replace(spec, policy=_shuffle(spec.policy))
        word = f"shuffled {member.name}"
        yield _control(variant, word, f"scores of {member.name} dealt to other blocks", shuffled)
    own = spec.window if _keeps_head(spec.window) else SinkWindow(SINKS, spec.block_size)
    budget = spec.budget.layers if spec.budget.by_head else spec.budget
    budget = by_name("equal") if budget.looks else budget  # at attention, of which none is heard
    groups = "per_layer" if budget.divides else "all"  # the newest are so for every head
    spec = replace(spec, policy=FIFO, window=own, evict="block", groups=groups, budget=budget)
    yield _control(variant, "window", "the newest tokens, in as many bytes", spec)


def _shuffle(make):
    """A factory of the shuffled policy around what `make` gives."""

    def shuffled() -> EvictionPolicy:
        return policies.Shuffled(make())

    return shuffled


# Words of a name, and settings, that a control replaces.
_REPLACED = {
    "random": ("policy",), "shuffled": ("policy",), "chance": ("retrieval",),
    "window": ("policy", "window", "retrieval"),
}


def _control(variant: Variant, word: str, told: str, spec: CacheSpec) -> Variant:
    """Named after its variant, `word` in place of the policy; its params mark it as a control."""
    axes = _REPLACED[word.partition(" ")[0]]
    own = variant.spec
    axes = (*axes, *("budget",) * (own.budget.name != spec.budget.name))
    members = {axis: own.member if axis == "policy" else getattr(own, axis)
               for axis in axes}  # fmt: skip
    gone = {form for axis in axes for form in (members[axis].name, f"{axis}={members[axis].name}")}
    words = [w for w in variant.name.split() if w not in gone and w.partition(".")[0] not in axes]
    params = {k: v for k, v in variant.params.items() if k.partition(".")[0] not in axes}
    params |= {"policy": spec.member.name, "control": told}
    return Variant(" ".join([word, *words, "(control)"]), params, spec)


def _keeps_head(window) -> bool:
    """Whether a window protects the first tokens of a long sequence."""
    return any(begin == 0 for begin, _ in window.protected(LONG))


def _peak_blocks(spec: CacheSpec, chunk_tokens: int) -> int:
    """Blocks of what a window leaves readable, whose last part the grid cuts, and of a chunk."""
    parts = [end - begin for begin, end in spec.window.readable(LONG)]
    return 1 + sum(-(-tokens // spec.block_size) for tokens in (*parts, chunk_tokens))


def _key(spec: CacheSpec) -> tuple:
    """What makes two specs the same cache."""
    others = tuple(_settings(getattr(spec, axis)) for axis in alike())
    budget = (spec.budget_blocks, spec.budget_bytes, spec.budget_percent)
    return (
        spec.format.identity, _made(spec.member), others, spec.block_size, budget, spec.groups,
        spec.evict,
    )


def _settings(member) -> str:
    """Class and settings of a member, and of members that it is made of."""
    held = {k: v for k, v in vars(member).items() if k[0] != "_"}
    inner = {k: _settings(v) for k, v in held.items() if isinstance(v, Equal)}
    return f"{type(member).__name__} {sorted((held | inner).items())}"


def _made(member: EvictionPolicy) -> tuple:
    """What a policy that has served nobody is: its class, its settings, and whom it wraps."""
    own = {k: v for k, v in getattr(member, "__dict__", {}).items()
           if isinstance(v, (bool, int, float, str, tuple))}
    inner = getattr(member, "member", None)
    return (
        type(member), str(sorted(own.items())),
        _made(inner) if isinstance(inner, EvictionPolicy) else (),
    )
