"""One composed cache as constructor arguments: what `conf/` mirrors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Literal

import torch

from kvlab import axes
from kvlab.budget import blocks_in, blocks_of, parts_of
from kvlab.cache import granularity
from kvlab.cache.making import Copied, made_anew, maker
from kvlab.core import BadInput, CacheGeometry, LayerShape, check_number
from kvlab.format import KVFormat
from kvlab.policy import EvictionPolicy
from kvlab.pool import fused_kernels, no_kernels
from kvlab.source import check_summary


@dataclass(frozen=True)
@axes.with_axes
class CacheSpec:
    """The axes of a cache, a field for each of the table. Strings mean the class with its defaults:
    one of ours by its short name, any other by its dotted path (`policy="my_module.MyPolicy"`).

    format: how sealed blocks are stored.
    policy: makes the eviction policy, once for each ledger; of an instance each ledger gets a
        copy, and the instance itself stays as it was.
    window: which tokens stay, whatever the policy says.
    prefix: whether sequences that begin alike share blocks.
    summary: what stands for evicted blocks.
    retrieval: which blocks a decoded token reads.
    offload: where evicted blocks go.
    budget: how a budget is divided among layer groups.
    block_size: tokens in a block, 1 to 256.
    budget_blocks, budget_bytes, budget_percent: at most one; blocks held by all sequences
        together, bytes of sealed blocks ("adaptive": what is free on the device when the cache is
        made for a model, less what else is needed there), or a share of the tokens seen.
    evict: what is chosen: a "block", or a "token": those that stay are gathered and sealed anew.
        "auto" becomes the token where the policy was published so and nothing here needs blocks
        (sharing, host memory, summaries, retrieval, a window that lets go), else the block.
    groups: "all" layers choose together what is evicted, or "per_layer", or, of tokens, "per_head":
        each key/value head of each layer for itself. "auto" becomes that, or of blocks "all".
    workspace_tokens: tokens of the past that are dequantized at a time.
    kernels: "auto", "torch" or "triton", see `pool.fused_kernels`.
    """

    block_size: int = 64
    budget_blocks: int | None = None
    budget_bytes: int | Literal["adaptive"] | None = None
    budget_percent: float | None = None
    groups: str = "auto"
    evict: str = "auto"
    workspace_tokens: int = 16384
    kernels: str = "auto"

    def __post_init__(self):
        for axis in axes.AXES:
            self._take(axis, getattr(self, axis))
        check_number("cache.block_size", self.block_size, 1, 256)
        check_number("cache.workspace_tokens", self.workspace_tokens)
        for field, value in granularity.settled(self).items():
            object.__setattr__(self, field, value)
        self._check_budget()
        self._check_combination()

    def _take(self, axis: str, given: object) -> None:
        """A name becomes its member; a policy becomes what makes one for each ledger."""
        if axis == "policy":
            given = maker(given)
        elif isinstance(given, str):
            given = axes.by_name(axis, given)
        elif given is None or isinstance(given, (int, float, list, tuple, dict, type)):
            raise BadInput(axis, given, "must be a member's name, or an object of its class")
        object.__setattr__(self, axis, given)

    @cached_property
    def member(self) -> EvictionPolicy:
        """The policy, to be asked what it is; ledgers get others from `policy()`."""
        return self.policy.member if isinstance(self.policy, Copied) else made_anew(self.policy)

    def _check_combination(self) -> None:
        """Refuse what would be accepted and do nothing."""
        evicts = self.member.evicts
        if self.member.asks and not self.prefix.hold:
            told = ", ".join(self.member.asks)
            raise BadInput("policy", self.member.name, f"goes by requests ({told}), whose blocks "
                           "only prefix=hash keeps when they are over; prefix=hash, or policy=lru")
        granularity.check(self)
        if self.budget_percent is not None and not evicts:
            raise BadInput("cache.budget_percent", self.budget_percent,
                           "needs an eviction policy that brings the cache down to it; policy=lru")
        if self.prefix.shares:
            self._check_sharing(evicts)
        if self.retrieval.selects:
            self.retrieval.blocks(self.block_size)
            if self.window.rerotate:
                raise BadInput("window.rerotate", True, "retrieval scores keys at the positions "
                               "they were stored with; window.rerotate=false")
            if self.format.residual:
                raise BadInput("format.residual", self.format.residual, "is read by every head, and"
                               f" retrieval={self.retrieval.name} has each choose among all whole "
                               "blocks; format.residual=0")

    @cached_property
    def by_token(self) -> bool:
        """Whether tokens are chosen, not blocks."""
        return self.evict == "token"

    @property
    def granularity(self) -> str:
        """What a name must add where the policy is not run as published, see `granularity.told`."""
        return granularity.told(self)

    @property
    def caution(self) -> str:
        """What is known to go wrong with this combination, "" where nothing is."""
        return self.format.caution(self.block_size)

    @property
    def choice(self) -> str:
        """Who chooses tokens for itself: "head", "layer" or "all"."""
        return granularity.CHOICES[self.groups]

    def _check_sharing(self, evicts: bool) -> None:
        if self.bounded and not evicts:
            raise BadInput("prefix", self.prefix.name, "keeps prefixes until the budget is full, "
                           "and policy=none takes none away; choose policy=lru")
        if not self.prefix.hold and not evicts:
            raise BadInput("prefix.hold", False, "lets the policy take blocks of running sequences,"
                           " and there is none; choose policy=lru with a budget")
        if self.prefix.hold and self.budget_percent is not None:
            raise BadInput("cache.budget_percent", self.budget_percent, "takes blocks of running "
                           "sequences; give prefix.hold=false, or cache.budget_blocks")
        if self.prefix.hold and evicts and self.window.protected(1) and self.window.middle:
            raise BadInput("window", self.window.name, "protects what prefix.hold keeps anyway; "
                           "give prefix.hold=false, or window.middle=false to free the rest")

    def _check_budget(self) -> None:
        named = {n: getattr(self, n) for n in ("budget_blocks", "budget_bytes", "budget_percent")}
        given = {n: v for n, v in named.items() if v is not None}
        if len(given) > 1:
            raise BadInput(f"cache.{list(given)[1]}", list(given.values())[1],
                           f"cache.{list(given)[0]} is given too; give one budget only")
        for name, value in given.items():
            if value == "adaptive" and name == "budget_bytes":
                continue
            most = 100 if name == "budget_percent" else inf
            whole = name == "budget_blocks"
            check_number(f"cache.{name}", value, 0, most, whole=whole, above=True, null=True)

    def geometry(
        self, layers: int, query_heads: int, kv_heads: int, head_dim: int
    ) -> CacheGeometry:
        """The shape of a model of equal layers, with this block size."""
        return CacheGeometry(layers, query_heads, kv_heads, head_dim, self.block_size)

    def layer_groups(self, g: CacheGeometry) -> list[tuple[int, ...]]:
        """Numbers of the layers that share block ids, group by group."""
        if self.groups != "all" and (self.budget.divides or not self.by_token):
            return [(layer,) for layer in range(g.layers)]
        return self.format.groups(g)

    def formats(self, g: CacheGeometry) -> list[KVFormat]:
        """The format of each layer group."""
        each = self.format.each(g.layers)
        return [each[layers[0]] for layers in self.layer_groups(g)]

    def capacities(self, g: CacheGeometry) -> list[int | None]:
        """Blocks that each layer group may hold; None without a budget.

        Raises `BadInput` below one block.
        """
        groups = self.layer_groups(g)
        if self.budget_blocks is not None:
            return blocks_of(self.budget, self.budget_blocks, groups)
        if self.budget_bytes is None:
            return [None] * len(groups)
        block = self.format.block_bytes(g)
        if self.budget_bytes == "adaptive":
            raise BadInput("cache.budget_bytes", "adaptive", "asks what a model leaves free: make "
                           "the cache with PagedCache.for_model")
        if self.budget_bytes < block:
            raise BadInput("cache.budget_bytes", self.budget_bytes,
                           f"is less than one block of this model, which takes {block} bytes")
        sizes = [format.block_bytes(g.part(layers))
                 for format, layers in zip(self.formats(g), groups)]  # fmt: skip
        return blocks_in(self.budget, self.budget_bytes, groups, sizes)

    def kept(
        self, groups: list[tuple[int, ...]], seen: list[int], lazy: Sequence[float | None] = (),
    ) -> list[float]:
        """What each layer group may keep under a relative budget, of the `seen` it has; lazy: what
        each gives the window of its attention, for a budget that `looks`."""
        parts = [n * self.budget_percent / 100 for n in seen]
        if self.budget.looks:
            least = sum(end - begin for begin, end in self.window.protected(max(seen)))
            whole = -(-least // self.block_size) * self.block_size
            return self.budget.kept(parts, seen, whole + self.block_size - 1, lazy)
        return parts_of(self.budget, parts, seen, groups)

    def checked_for(self, g: CacheGeometry) -> CacheSpec:
        """Self, after every refusal that needs the model's shape."""
        for format, layers in zip(self.formats(g), self.layer_groups(g)):
            format.planes(g.part(layers))
            format.check_blocks(g.block_size)
        if self.budget_bytes != "adaptive":  # decided when the cache is made
            self._check_residual(g, self.capacities(g))
        self._check_effect()
        if self.budget.divides and len(self.layer_groups(g)) == 1:
            raise BadInput("budget", self.budget.name, "divides among layer groups and there "
                           "is only one; cache.groups=per_layer")
        self.budget.weights(self.layer_groups(g))
        self.budget.check([shape.kv_heads for shape in g.shapes])
        check_summary(self, g)
        self._check_sliding(g)
        return self

    def _check_residual(self, g: CacheGeometry, capacities: list[int | None]) -> None:
        """Where blocks are evicted, the newest ones are never among them."""
        for format, blocks in zip(self.formats(g), capacities):
            most = None if blocks is None or self.by_token else blocks * g.block_size
            if most is not None and most <= format.residual:
                raise BadInput("format.residual", format.residual, f"tokens stay, and the budget "
                               f"has {most} for all; a smaller residual or a larger budget")

    def _check_effect(self) -> None:
        """Refuse axes that would never act on a live cache; a simulator brings its own budget."""
        policy, bounded = self.member, self.bounded
        if policy.evicts and not bounded:
            raise BadInput("policy", policy.name, "never evicts without a budget: give "
                           "cache.budget_blocks, cache.budget_bytes or cache.budget_percent")
        if self.window.protected(1) and self.window.middle and not policy.evicts:
            raise BadInput("window", self.window.name, "protects tokens from an eviction policy and"
                           " there is none; choose one, or window.middle=false to free the rest")
        if (self.budget.divides or self.budget.by_head) and not bounded:
            raise BadInput("budget", self.budget.name, "divides a budget and there is "
                           "none: give cache.budget_percent, cache.budget_blocks or "
                           "cache.budget_bytes")
        if self.offload.keeps:
            self._check_offload(evicts=bounded and policy.evicts)

    def _check_sliding(self, g: CacheGeometry) -> None:
        """Refuse what the model's own sliding windows leave no room for."""
        windows = {shape.window for shape in g.shapes}
        if windows == {None}:
            return
        own = f"the model's own sliding window of {min(map(abs, windows - {None}))} tokens"
        if self.by_token:
            raise BadInput("cache.evict", "token", "lets each head's tokens stand side by side, "
                           f"and {own} counts them where they stood; cache.evict=block")
        if self.window.rerotate:
            raise BadInput("window.rerotate", True, f"moves tokens together, and {own} counts them "
                           "where they stood; window.rerotate=false")
        if self.retrieval.selects and None not in windows:
            raise BadInput("retrieval", self.retrieval.name, f"has nothing to choose: {own} is all "
                           "that any layer reads; retrieval=none")

    def _check_offload(self, evicts: bool) -> None:
        name = self.offload.name
        if not evicts:
            raise BadInput("offload", name, "takes what is evicted, and nothing is: give a budget "
                           "(cache.budget_bytes) and a policy (policy=fifo)")
        if not self.window.middle:
            raise BadInput("offload", name, "keeps what window.middle=false says is never read "
                           "again; take window.middle=true or offload=none")
        if self.offload.mode != "exclusive" and not (self.prefix.shares and self.prefix.hold):
            raise BadInput("offload.mode", self.offload.mode, "keeps a second copy of known "
                           "prefixes; it needs prefix=hash with prefix.hold=true")
        if self.summary.stands:
            raise BadInput("offload", name, f"keeps evicted tokens, and summary={self.summary.name}"
                           " stands for them: they would count twice; take one of the two")

    def why_plain(self, shapes: Sequence[LayerShape], device: torch.device) -> str | None:
        """Why plain torch reads blocks of a model where kernels are wanted, or None."""
        if fused_kernels(device.type, self.kernels) is None:
            return None
        pairs = zip(self.format.each(len(shapes)), shapes)
        return next(filter(None, (no_kernels(*pair) for pair in pairs)), None)

    @property
    def bounded(self) -> bool:
        """Whether there is a budget of any kind."""
        return (self.budget_blocks, self.budget_bytes, self.budget_percent) != (None, None, None)

    def check_positions(self, inv_freq) -> None:
        """Raises `BadInput` where the window needs rotary frequencies that nobody gave."""
        if self.window.rerotate and inv_freq is None:
            raise BadInput("window.rerotate", True, "needs a model with plain rotary positions")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Open blocks hold what the model computes in. Raises `BadInput` for anything exotic."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise BadInput("model.dtype", dtype, "must be float32, float16 or bfloat16")
    return dtype
