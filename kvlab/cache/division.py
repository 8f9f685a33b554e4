"""What each layer group may hold of what its sequences have seen: the budget, divided."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvlab.core import LayerShape, SeqId


def blocks_kept(spec, parts: list[tuple[int, ...]], shapes: Sequence[LayerShape],
                lengths: Iterable[int]) -> list[float]:  # fmt: skip
    """Blocks of each group under a relative budget, for sequences of these lengths.

    parts: numbers of the layers of each group, which have the `shapes`. What a model's own window
    no longer sees is no part of it.
    """
    lengths = list(lengths)
    seen = [sum(-(-shape.seen(n) // spec.block_size) for n in lengths) for shape in shapes]
    return spec.kept(parts, seen)


def tokens_allowed(spec, parts: list[tuple[int, ...]], capacities: list[int | None],
                   seen: dict[SeqId, int], lazy: dict[SeqId, list[float | None]],
                   ) -> list[dict[SeqId, int]]:  # fmt: skip
    """Of the tokens that each sequence has seen, those that each group may hold, in proportion.

    capacities: blocks of each group, where the budget is no relative one. lazy: `CacheSpec.kept`.
    """
    if spec.budget_percent is not None:
        kept = {seq: spec.kept(parts, [n] * len(parts), lazy[seq]) for seq, n in seen.items()}
        return [{seq: int(by[i]) for seq, by in kept.items()} for i in range(len(parts))]
    total = max(1, sum(seen.values()))
    rooms = [blocks * spec.block_size for blocks in capacities]
    return [{seq: room * n // total if total > room else n for seq, n in seen.items()}
            for room in rooms]  # fmt: skip
