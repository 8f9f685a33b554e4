"""Compositions that evict tokens: what was measured of them, beside what fits without."""

from __future__ import annotations

import re
from typing import NamedTuple

from kvlab.advice.account import account
from kvlab.advice.ask import Ask
from kvlab.advice.choices import spec_of
from kvlab.advice.table import Loss, evictions
from kvlab.core import CacheGeometry
from kvlab.model import Outline

FORGETS = ("the tokens that the policy gives least, each head its own, and for good; a question "
           "that was not seen may need one of them")  # fmt: skip
VLLM = "none: no policy evicts tokens of a request that runs"
TRANSFORMERS = ("none of its own: NVIDIA's kvpress evicts during prefill over a DynamicCache in 16 "
                "bits, and decoded tokens leave in few of its methods")  # fmt: skip


class Evicting(NamedTuple):
    """bytes: of the device at the end. losses: one row for each model that was measured.
    block_size, chunk_tokens: with which it was."""

    options: tuple[str, ...]
    bytes: int
    losses: list[Loss]
    block_size: int
    chunk_tokens: int

    @property
    def name(self) -> str:
        return " ".join(o.removeprefix("policy=") for o in self.options if o != "format=bf16")

    @property
    def share(self) -> float:
        """Of the tokens, in %, that stay."""
        budget = "cache.budget_percent="
        return next(float(o.removeprefix(budget)) for o in self.options if o.startswith(budget))

    @property
    def worst(self) -> float:
        """By which they are ordered: KL on the model that loses most."""
        return max(row.kl.value for row in self.losses if row.kl)


def evicting(ask: Ask, model: Outline, kernels: bool = True) -> list[Evicting]:
    """Every composition that was measured; what loses least comes first. kernels: as in `account`.
    """
    found: dict[tuple[str, ...], list[Loss]] = {}
    for row in evictions():
        if any(o.startswith("policy=") for o in row.options):
            found.setdefault(row.options, []).append(row)
    made = []
    for options, rows in found.items():
        own = [int(re.search(rf"{what} of (\d+)", rows[0].setting)[1])
               for what in ("blocks", "chunks")]  # fmt: skip
        g = CacheGeometry.of(model.portrait.shapes, model.portrait.query_heads, own[0])
        told = account(spec_of(options, own[0]), g, ask.context, ask.requests, kernels)
        made.append(Evicting(options, told.device, rows, *own))
    return sorted(made, key=lambda one: one.worst)


def least(found: list[Evicting]) -> list[Evicting]:
    """Of each share of the tokens what loses least, with a summary and without, the largest share
    first; `found` is in the order of `evicting`."""
    best: dict[tuple[float, bool], Evicting] = {}
    for one in found:
        summed = any(o.startswith("summary=") for o in one.options)
        best.setdefault((-one.share, summed), one)
    return [best[key] for key in sorted(best)]
