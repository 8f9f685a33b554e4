"""Compositions that evict tokens: what was measured of them, beside what fits without."""

from __future__ import annotations

from typing import NamedTuple

from kvlab.advice.account import account
from kvlab.advice.ask import Ask
from kvlab.advice.choices import spec_of
from kvlab.advice.table import BLOCK_SIZE, Loss, evictions
from kvlab.core import CacheGeometry
from kvlab.model import Outline

FORGETS = ("the tokens that the policy gives least, each head its own, and for good; a question "
           "that was not seen may need one of them")  # fmt: skip
VLLM = "none: no policy evicts tokens of a request that runs"
TRANSFORMERS = ("none of its own: NVIDIA's kvpress evicts during prefill over a DynamicCache in 16 "
                "bits, and decoded tokens leave in few of its methods")  # fmt: skip


class Evicting(NamedTuple):
    """bytes: of the device at the end. losses: one row for each model that was measured."""

    options: tuple[str, ...]
    bytes: int
    losses: list[Loss]

    @property
    def name(self) -> str:
        return " ".join(o.removeprefix("policy=") for o in self.options if o != "format=bf16")

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
    g = CacheGeometry.of(model.portrait.shapes, model.portrait.query_heads, BLOCK_SIZE)
    made = []
    for options, rows in found.items():
        told = account(spec_of(options), g, ask.context, ask.requests, kernels)
        made.append(Evicting(options, told.device, rows))
    return sorted(made, key=lambda one: one.worst)
