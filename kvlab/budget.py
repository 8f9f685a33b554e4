"""Axis `budget`: how the blocks of a budget are divided among layer groups.

A member gives each group a weight whose mean over the layers is 1; what the cache or a size formula
may hold on average in a layer is multiplied by it. Groups are whoever shares block ids: all layers
of one shape, each layer for itself, or anything finer that the cache has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from itertools import chain
from math import floor, inf
from pathlib import Path
from typing import Any

from kvlab import axes, kinds
from kvlab.core import BadInput

Layers = Sequence[int]  # numbers of the layers of one group


@kinds.members("budget")
class Equal:
    """Every layer may hold as many blocks as every other."""

    name = "equal"
    divides = False  # whether groups get unlike shares
    by_head = False  # whether heads of a layer get unlike shares
    adapts = False  # whether these follow the scores
    across = False  # whether heads of all layers then compete, not those of each layer
    looks = False  # whether those of groups follow what their layers look at: `kept`

    def weights(self, groups: Sequence[Layers]) -> list[float]:
        """The share of each group in the budget; the mean over all layers is 1."""
        return [1.0] * len(groups)

    def check(self, heads: Sequence[int]) -> None:
        """Raises `BadInput` where this does not fit a model of so many key/value heads by layer."""


class Pyramid(Equal):
    """Lower layers, which spread their attention, may hold more than upper ones.

    PyramidKV (Cai et al. 2024, https://arxiv.org/abs/2406.02069): shares fall linearly from
    2 - 1 / beta in the first layer to 1 / beta in the last; the paper takes a beta of 20.
    Differs: what is always kept (the paper's last tokens) is the window axis and counts within a
    layer's share; a group of several layers gets the mean of theirs; a relative budget that gives
    a layer more than it has seen passes the rest on.
    """

    name = "pyramid"
    divides = True

    def __init__(self, beta: float = 20.0):
        if isinstance(beta, bool) or not beta >= 1:
            raise BadInput("budget.beta", beta, "must be at least 1, which makes all layers equal")
        self.beta = beta

    def weights(self, groups):
        last = sum(map(len, groups)) - 1
        least = 1 / self.beta
        slope = 2 * (1 - least) / last if last else 0.0
        first = 1.0 if not last else 2 - least
        return [sum(first - slope * layer for layer in group) / len(group) for group in groups]


class Shares(Equal):
    """Given shares, one number for each layer group: as they relate, so are blocks divided.

    shares: `[3, 1]` lets a layer of the first group hold three times what one of the second may.
    """

    name = "shares"
    divides = True

    def __init__(self, shares: Sequence[float] | None = None):
        if not shares or any(isinstance(x, (bool, str)) or not x > 0 for x in shares):
            raise BadInput("budget.shares", shares, "must be positive numbers, one for each layer "
                           "group: budget.shares=[3,1]")
        self.shares = tuple(map(float, shares))

    def weights(self, groups):
        if len(groups) != len(self.shares):
            raise BadInput("budget.shares", list(self.shares), f"must be {len(groups)} numbers, one"
                           " for each layer group of this cache")
        sizes = [len(group) for group in groups]
        mean = sum(n * x for n, x in zip(sizes, self.shares)) / sum(sizes)
        return [x / mean for x in self.shares]


class SimLayer(Equal):
    """Layers that look at little but the window hold the window alone, the others everything.

    SimLayerKV (Zhang et al. 2024, https://arxiv.org/abs/2410.13846): a layer is lazy where the last
    32 queries of a prompt give the first and the newest tokens, those of the window, more than
    `threshold` of their attention. The least lazy hold all they have seen, until the budget is
    spent; one that it does not suffice for keeps its best tokens. cache.budget_percent=100 with a
    window of 4 and 1,020 tokens is the paper's. threshold: null: the budget says how many are lazy.
    Differs: the newest tokens of each query, in every chunk of a prompt; not while decoding.
    """

    name = "simlayer"
    divides = looks = True

    def __init__(self, threshold: float | None = 0.9):
        if threshold is not None and not 0 <= threshold <= 1:
            raise BadInput("budget.threshold", threshold, "must be from 0 to 1, a share of "
                           "attention, or null")
        self.threshold = threshold

    def kept(
        self, parts: Sequence[float], most: Sequence[int], least: int,
        lazy: Sequence[float | None],
    ) -> list[float]:
        """What each layer may hold of the `most` it has seen, where equal shares would be `parts`;
        least: the window. lazy: shares of attention, None where no layer was looked at yet."""
        if None in lazy:
            return list(most)  # until the end of the first step, which tells
        given = [float(min(n, least)) for n in most]
        left = sum(parts) - sum(given)
        if left < 0:  # the window alone is more than the budget
            return list(parts)
        for layer in sorted(range(len(most)), key=lambda i: lazy[i]):
            if self.threshold is None or lazy[layer] <= self.threshold:
                more = min(left, most[layer] - given[layer])
                given[layer] += more
                left -= more
        return given


class ByHead(Equal):
    """What divides among the key/value heads of a layer, over a member that divides among layers.

    layers: the name of that member, or itself.
    """

    name = ""
    by_head = True

    def __init__(self, layers: str | Equal = "equal"):
        self.layers = by_name(layers) if isinstance(layers, str) else layers
        if self.layers.by_head:
            raise BadInput("budget.layers", self.layers.name, "divides among heads itself; name "
                           "what divides among layers: equal, pyramid")
        if self.layers.looks:
            raise BadInput("budget.layers", self.layers.name, "gives some layers all they have "
                           "seen, and nothing is left to divide among heads; equal or pyramid")

    @property
    def divides(self) -> bool:
        return self.layers.divides

    def weights(self, groups):
        return self.layers.weights(groups)


class AdaKV(ByHead):
    """Heads whose scores stand out hold more than others: the best tokens of all heads stay.

    AdaKV (Feng et al. 2024, https://arxiv.org/abs/2407.11550), over any scorer: of the budget of a
    layer, each head gets a `floor` (0.2, as published) of its equal part, and the rest goes to the
    tokens of highest score, whichever head they are of.
    layers: what divides among layers. Differs: whole blocks of a head's next best tokens, by their
    mean; cache.block_size=1 is the paper's.
    """

    name = "adakv"
    adapts = True

    def __init__(self, floor: float = 0.2, layers: str | Equal = "equal"):
        super().__init__(layers)
        if not 0 <= floor <= 1:
            raise BadInput("budget.floor", floor, "must be from 0 to 1, a share of the equal part")
        self.floor = floor


class AllHeads(AdaKV):
    """The best tokens of all heads of all layers stay, whichever head they are of.

    The budget of KVzip (Kim et al. 2025, https://arxiv.org/abs/2505.23416), for a policy that waits
    until a context is over, when all layers are there. floor: of a head's equal part, which stays
    its own (0, as published). Differs as AdaKV does; layers of another shape or format are apart.
    """

    name = "all_heads"
    across = True

    def __init__(self, floor: float = 0.0):
        super().__init__(floor)


class DuoAttention(ByHead):
    """Heads that retrieve keep everything, the others the window alone.

    DuoAttention (Xiao et al. 2024, https://arxiv.org/abs/2410.10819). gates: for each layer a
    number for each key/value head, or the path of a JSON file of them; the more, the more it
    retrieves (`python -m kvlab.model.gates` measures them). In that order heads keep all they have
    seen, until the budget is spent; a head that it does not suffice for keeps its best tokens.
    Differs: the paper trains the gates, on passkeys; the share of heads follows from the budget.
    """

    name = "duo"

    def __init__(self, gates: Any = None):  # a file's name, or numbers; judged here, in its words
        super().__init__()
        if isinstance(gates, str):
            gates = _read_gates(gates)
        rows = gates if kinds.fits(gates, Sequence[Sequence[float]]) else []
        finite = all(-inf < gate < inf for gate in chain.from_iterable(rows))
        if not rows or len({len(row) for row in rows}) > 1 or not rows[0] or not finite:
            raise BadInput("budget.gates", gates, "must be a number for each key/value head of "
                           "each layer, or a JSON file of them: python -m kvlab.model.gates")
        self.gates = tuple(tuple(map(float, row)) for row in rows)

    def check(self, heads):
        if [len(row) for row in self.gates] != list(heads):
            raise BadInput("budget.gates", f"{len(self.gates)} x {len(self.gates[0])}",
                           f"must be {len(heads)} layers of {heads[0]} key/value heads here")

    def blocks(self, have: Sequence[Sequence[int]], least: int, total: int) -> list[list[int]]:
        """Blocks for each head of each layer that has so many, `total` in all; `least`: of those
        that do not retrieve."""
        order = sorted(((gate, layer, head) for layer, row in enumerate(self.gates)
                        for head, gate in enumerate(row)), key=lambda x: -x[0])  # fmt: skip
        given = [[min(n, least) for n in row] for row in have]
        left = total - sum(map(sum, given))
        if left < 0:  # the window alone is more than the budget
            each = total // len(order)
            return [[min(n, each) for n in row] for row in have]
        for _, layer, head in order:
            more = min(left, have[layer][head] - given[layer][head])
            given[layer][head] += more
            left -= more
        return given


def _read_gates(path: str) -> object:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput("budget.gates", path, f"cannot be read: {error}") from error


by_name = partial(axes.by_name, "budget")


def blocks_of(budget: Equal, blocks: int, groups: Sequence[Layers]) -> list[int]:
    """Blocks for each group, where a layer may hold `blocks` on average; never more in all.

    Raises `BadInput` where a group would get none.
    """
    return _whole(budget, [Fraction(w) * blocks for w in budget.weights(groups)])


def blocks_in(
    budget: Equal, nbytes: int, groups: Sequence[Layers], block_bytes: Sequence[float]
) -> list[int]:
    """Blocks for each group that together take at most `nbytes`.

    block_bytes: of one block of each group. Raises `BadInput` where a group would get none.
    """
    weights = [Fraction(w) for w in budget.weights(groups)]
    each = Fraction(nbytes) / sum(w * Fraction(size) for w, size in zip(weights, block_bytes))
    return _whole(budget, [w * each for w in weights])


def _whole(budget: Equal, found: list[Fraction]) -> list[int]:
    if budget.looks:
        raise BadInput("budget", budget.name, "follows what layers look at in a prompt, of which "
                       "they hold a share; cache.budget_percent")
    whole = [floor(x) for x in found]
    if min(whole) < 1:
        raise BadInput("budget", budget.name, f"leaves no block for layer group "
                       f"{whole.index(min(whole))}; raise cache.budget_blocks or "
                       "cache.budget_bytes, or divide more evenly")
    return whole


def parts_of(
    budget: Equal, parts: Sequence[float], most: Sequence[float], groups: Sequence[Layers]
) -> list[float]:
    """What each group may hold, where equal shares would be `parts` and it has `most` in all.

    What a group has no use for goes to the layers of the others, in proportion to their shares.
    """
    wanted = [part * weight for part, weight in zip(parts, budget.weights(groups))]
    sizes, left = [len(group) for group in groups], set(range(len(groups)))
    while over := [i for i in left if wanted[i] > most[i]]:
        spare = sum(sizes[i] * (wanted[i] - most[i]) for i in over)
        for i in over:
            wanted[i] = most[i]
        left -= set(over)
        total = sum(sizes[i] * wanted[i] for i in left)
        for i in left if total else ():
            wanted[i] *= 1 + spare / total
    return wanted
