"""What a budget asks around a step: room that is promised before it, and what goes behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kvlab.blocks import Sequences
from kvlab.cache.division import blocks_kept, tokens_allowed
from kvlab.cache.layers import Layers
from kvlab.core import KvlabError, SeqId
from kvlab.source import Extent


class Shares:
    """The layer groups' shares of what `sequences` have seen: a relative budget in blocks, or
    tokens that are chosen (cache.evict=token). A budget in blocks is the ledgers' own affair.

    relative: whether blocks go behind a step. promises: and whether the host must have room."""

    def __init__(self, layers: Layers, sequences: Sequences):
        self.layers, self.sequences = layers, sequences
        self.spec, self.groups = layers.spec, layers.groups
        self.relative = not self.spec.by_token and self.spec.budget_percent is not None
        self.promises = self.relative and self.spec.offload.keeps
        self.waits = self.spec.by_token and self.spec.member.waits
        self.filling = False  # whether the tokens that come are a context's

    # ---- before a step

    def foresee(self, counts: dict[SeqId, int]) -> None:
        """Tell the groups what their sequences will have seen after this step, and may hold."""
        seen = {seq: n + counts.get(seq, 0) for seq, n in self.sequences.lengths.items()}
        if self.waits:
            self._check_context(counts)
        if self.spec.budget.looks:
            self._check_prompt(counts)
        for group, keep in zip(self.groups, self._allowed(seen)):
            keep = seen if self.waits else keep
            group.held.seen, group.held.keep = seen, keep

    def promise_host(self, step: list[list[Extent]]) -> None:
        """Have the host memory that a relative budget may need behind this step, before it runs.

        Raises `OutOfHost`: then, the step would stand.
        """
        lengths, others = dict(self.sequences.lengths), {}
        for row in step:
            lengths[row[0].seq] += row[0].count
        for number, (group, share) in enumerate(zip(self.groups, self._blocks(lengths.values()))):
            sealing = sum(len(row[number].sealing) for row in step)
            over = min(group.ledger.held_count - max(1, int(share)),
                       group.ledger.evictable_count + sealing)
            if over > 0 and self.spec.prefix.shares:
                group.held.room.exit.host_room(over)  # known contents there may go for it
            elif over > 0:
                group.sources.host.shelf.require_beside(over, others)

    def looks(self, seqs: list[SeqId], counts: list[int]) -> bool:
        """Whether single tokens of this step are scored: then it is read piece by piece, as one
        with a chunk in it is anyway."""
        if max(counts, default=0) > 1:
            for group in self.groups:
                group.watch.looking = 1 in counts and group.watch.scorer.decodes
            return True
        seqs = [seq for seq, count in zip(seqs, counts) if count]
        looks = [group.chooser.look(group.tables, keep)
                 for group, keep in zip(self.groups, self.kept(seqs))]  # all hear of it
        return any(looks)

    # ---- behind it

    def settle(self, singles: bool) -> None:
        """Bring the cache back to its budget. singles: a step of decoding, which may exceed the
        budget for a while where tokens are chosen."""
        if self.waits:
            self._hear()
        elif self.spec.by_token:
            self._repack(singles)
        elif self.relative:
            self._trim()

    def _trim(self) -> None:
        for group, share in zip(self.groups, self._blocks(self.sequences.lengths.values())):
            keep = max(1, int(share - group.summaries.blocks))
            short = (group.ledger.held_count - keep) / group.summaries.gain
            over = min(math.ceil(short), group.ledger.evictable_count)
            if over > 0:
                group.held.room.evict(over)

    def compress(self) -> None:
        """The context of all sequences is over: bring it to the budget, if a policy waits."""
        if self.waits:
            self._repack(singles=False)
            for group in self.groups:
                group.watch.standings.over.update(self.sequences.lengths)

    def _check_context(self, seqs: Iterable[SeqId]) -> None:
        """Raises `KvlabError` where nobody would ever say that a context is over."""
        name, over = self.spec.member.name, self.groups[0].watch.standings.over
        for seq in seqs:
            if self.filling and seq in over:
                raise KvlabError(f"policy={name} has compressed this context already, and what "
                                 "comes later stays; a new cache for a new context")
            if not self.filling and seq not in over:
                raise KvlabError(f"policy={name} has the model repeat a context when it is over, "
                                 "and nobody would say when; fill the cache with kvlab.prefill")

    def _check_prompt(self, counts: dict[SeqId, int]) -> None:
        """Raises `KvlabError` where no layer could be looked at."""
        lazy = self.groups[0].watch.standings.lazy
        if any(count == 1 and seq not in lazy for seq, count in counts.items()):
            raise KvlabError(f"budget={self.spec.budget.name} tells lazy layers by the last "
                             "queries of a prompt; its first step needs several tokens")

    def _hear(self) -> None:
        for group in self.groups:
            for seq in self.sequences.lengths:
                group.chooser.hear(seq)
            group.watch.abort()

    def _repack(self, singles: bool) -> None:
        self._hear()
        for group, kept in zip(self.groups, self.kept(self.sequences.lengths)):
            for seq, keep in kept.items():
                over = group.chooser.over(group.tables[seq], keep, slack=singles)
                if over:
                    group.repack(seq, over, self.sequences.lengths[seq])

    # ---- the shares

    def kept(self, seqs: Iterable[SeqId]) -> list[dict[SeqId, int]]:
        """Tokens that each of `seqs` may hold now, by layer group."""
        return [{seq: keep[seq] for seq in seqs} for keep in self._allowed(self.sequences.lengths)]

    def _allowed(self, seen: dict[SeqId, int]) -> list[dict[SeqId, int]]:
        """Of the tokens seen, those that each group may hold."""
        lazy = {seq: [group.watch.standings.lazy.get(seq) for group in self.groups] for seq in seen}
        return tokens_allowed(self.spec, self.layers.parts, self.layers.capacities, seen, lazy)

    def _blocks(self, lengths: Iterable[int]) -> list[float]:
        """Blocks that each group may hold of sequences of these lengths."""
        shapes = [group.pool.shape for group in self.groups]
        return blocks_kept(self.spec, self.layers.parts, shapes, lengths)
