"""Sequences of a live cache: opened, told of, forked, cut, closed; and what each of them found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvlab.blocks import Chain
from kvlab.cache.audit import Audit, audited
from kvlab.cache.layers import Layers
from kvlab.cache.lineage import Lineage
from kvlab.cache.moments import Moments
from kvlab.core import SeqId


class Requests:
    """What a live cache adds to the request protocol (`kvlab.blocks.Sequences`): tokens that are
    heard of late, audits, and a look at the model that computes.

    audits: what each request found, by sequence. moments: what policies hear of it.
    """

    def __init__(self, layers: Layers, lineage: Lineage):
        self.layers, self.lineage, self.sequences = layers, lineage, lineage.sequences
        self.audits: dict[SeqId, Audit] = {}
        self.moments = Moments(layers.groups[0].ledger.policy)
        # told, and not looked at yet
        self._late: list[tuple[list[tuple[SeqId, int]], Tensor]] = []

    # ---- a sequence comes and goes

    def open(
        self, token_ids: Sequence[int] = (), *, reserve: int = 0, most: int | None = None,
        session: int | None = None, tool: bool | None = None,
    ) -> SeqId:
        """A new sequence; `length` tells how many of its tokens are there already.

        token_ids: what it will begin with. With prefix=hash it starts with the longest known run
        of whole blocks of them, but for the last token, which is always computed.
        reserve: tokens that it will reach; their blocks are set aside now, so that it cannot run
        out of blocks before. Raises `OutOfBlocks`; nothing but evictions has happened then.
        most: known blocks to start with, at most.
        session, tool: which conversation it goes on (0 or more), and whether its answer will call a
        tool, for policies that go by them; `BadInput` where they do and nobody says it.
        """
        if len(token_ids) and not isinstance(token_ids, Chain):
            self.lineage.recheck()
        moment = None
        if self.moments.policy.asks:
            tokens = token_ids.tokens if isinstance(token_ids, Chain) else len(token_ids)
            moment = self.moments.next(tokens, session, tool)
            self.sequences.hear(moment)
        found: list[Audit] = []
        seq, _ = self.sequences.open(
            token_ids, reserve=reserve, most=most,
            look=lambda opened, chain: found.append(audited(self.layers, opened, chain)),
        )
        if moment is not None:
            self.moments.begun(moment)
        self.audits.update((seq, audit) for audit in found)
        return seq

    def open_together(self, prompts: Sequence[Sequence[int]], pads: Sequence[int]) -> list[SeqId]:
        """A sequence for each prompt, such that pad plus length is the same for all of them."""
        size = self.layers.geometry.block_size
        self.lineage.recheck()
        chains = [self.sequences.chain(ids) for ids in prompts]
        hits = [self.sequences.hits(chain)[1] for chain in chains]
        common = min((p + n * size for p, n in zip(pads, hits)), default=0)
        even = all(p <= common and (common - p) % size == 0 for p in pads)
        most = [(common - p) // size if even else 0 for p in pads]
        rows: list[SeqId] = []
        try:
            for chain, blocks in zip(chains, most):
                rows.append(self.open(() if chain is None else chain, most=blocks))
        except Exception:
            for row in rows:
                self.close(row)
            raise
        return rows

    def length(self, seq: SeqId) -> int:
        """Tokens of `seq` seen so far, evicted ones included."""
        return self.sequences.length(seq)

    def tell(self, seq: SeqId, token_ids: Sequence[int], at: int | None = None) -> None:
        """Say which tokens the next steps of `seq` compute: only known tokens can be shared.

        at: position of the first of them (the next), for a driver that knows them later.
        """
        self.sequences.tell(seq, token_ids, at)

    def tell_later(self, places: list[tuple[SeqId, int]], tokens: Tensor) -> None:
        """The same of a token of each (sequence, position), tokens [B] on the device: looked at
        when somebody has to know, so that nobody waits before."""
        self._late.append((places, tokens))

    def catch_up(self) -> None:
        """Hear of what was told late."""
        late, self._late = self._late, []
        tokens = torch.cat([tokens for _, tokens in late]).tolist() if late else ()
        places = [place for places, _ in late for place in places]
        for (seq, at), token in zip(places, tokens):
            self.tell(seq, [token], at)

    def close(self, seq: SeqId) -> None:
        """Forget `seq` and give its blocks back; a step that it takes part in is aborted."""
        self.close_all([seq])

    def close_all(self, seqs: Sequence[SeqId]) -> None:
        """The same for the sequences of a request: what the model of now computed may stay known.
        """
        self.sequences.stop(seqs)
        if seqs:
            self.lineage.recheck(here=False)
        self.catch_up()
        self.sequences.close(seqs)

    def fork(self, seq: SeqId) -> SeqId:
        """A second sequence with the same past: sealed blocks shared, the open tail copied."""
        return self.fork_all([seq])[0]

    def fork_all(self, parents: Sequence[SeqId]) -> list[SeqId]:
        """A fork of each of `parents`; all forks or none, see `Sequences.fork`."""
        self.sequences.between_steps("forked")
        self.catch_up()
        return self.sequences.fork(parents)

    def truncate(self, seq: SeqId, length: int) -> None:
        """Forget the tokens of `seq` from `length` on; all layers do, or an error says why not."""
        self.truncate_all({seq: length})

    def truncate_all(self, lengths: dict[SeqId, int]) -> None:
        """The same for several sequences; what one of them cannot do is done to none."""
        self.sequences.between_steps("cropped")
        self.catch_up()
        self.sequences.truncate(lengths)

    def audit(self, seq: SeqId | None = None) -> list[dict]:
        """Rows saying what requests found: of `seq`, or of all since the cache was made."""
        chosen = self.audits if seq is None else {seq: self.audits[seq]}
        return [audit.row(seq) for seq, audit in chosen.items()]
