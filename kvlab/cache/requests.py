"""What a live cache adds to the request protocol: who computed a block, audits, stores on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvlab.blocks import Chain, Prefixes, Sequences
from kvlab.blocks import PrefixHandle as Handle
from kvlab.cache import store
from kvlab.cache.audit import Audit, audited
from kvlab.cache.store import Stored
from kvlab.core import BadInput, KvlabError, SeqId


class Requests:
    """The part of `PagedCache` that opens, forks, cuts and closes sequences, and shares prefixes.

    sequences, prefixes: the protocol itself, see `kvlab.blocks`. The model that fills a cache may
    change under it; without prefix=hash nobody looks.
    renewals: how many times what was known was dropped since the model had changed.
    """

    sequences: Sequences
    prefixes: Prefixes
    audits: dict[SeqId, Audit]
    renewals = 0
    _late: list[tuple[list[tuple[SeqId, int]], Tensor]]  # told, and not looked at yet

    @property
    def identity(self) -> str:
        """What decides which bytes a block of known tokens holds."""
        return self.sequences.identity

    # ---- a sequence comes and goes

    def open(
        self, token_ids: Sequence[int] = (), *, reserve: int = 0, most: int | None = None
    ) -> SeqId:
        """A new sequence; `length` tells how many of its tokens are there already.

        token_ids: what it will begin with. With prefix=hash it starts with the longest known run
        of whole blocks of them, but for the last token, which is always computed.
        reserve: tokens that it will reach; their blocks are set aside now, so that it cannot run
        out of blocks before. Raises `OutOfBlocks`; nothing but evictions has happened then.
        most: known blocks to start with, at most.
        """
        if len(token_ids) and not isinstance(token_ids, Chain):
            self.recheck()
        found: list[Audit] = []
        seq, _ = self.sequences.open(
            token_ids, reserve=reserve, most=most,
            look=lambda opened, chain: found.append(audited(self, opened, chain)),
        )
        self.audits.update((seq, audit) for audit in found)
        return seq

    def open_together(self, prompts: Sequence[Sequence[int]], pads: Sequence[int]) -> list[SeqId]:
        """A sequence for each prompt, such that pad plus length is the same for all of them."""
        size = self.geometry.block_size
        self.recheck()
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
            self.recheck(here=False)
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

    # ---- prefixes in no sequence's name

    def cache_prefix(
        self, token_ids: Sequence[int], pin: bool = True, seq: SeqId | None = None
    ) -> Handle:
        """Keep what is held of the whole blocks of `token_ids`, in no sequence's name.

        With `pin` they stay until `release_prefix`, else as long as the policy leaves them. A
        live sequence that holds these tokens is found by them; `seq` names one whose tokens the
        cache was never told. Only blocks computed with no hole before them can be kept, so the
        handle may hold fewer `tokens` than were asked for, or none.
        """
        self._refuse_none()
        self.catch_up()
        self.recheck()
        if seq is not None:
            self._refuse_outdated([seq], "nothing of it can be kept")
            self.sequences.tell(seq, token_ids, 0)
        return self.prefixes.keep(token_ids, pin)

    def attach_prefix(self, token_ids: Sequence[int]) -> Handle:
        """Find and pin the longest run of whole blocks that is there; possibly none.

        Counts as a use, the tail being the first to leave again. `open(token_ids)` does the same
        for a sequence; this is for keeping a prefix while no sequence uses it.
        """
        self._refuse_none()
        self.recheck()
        return self.prefixes.attach(token_ids)

    def release_prefix(self, handle: Handle) -> None:
        """Unpin a handle's blocks, tail first. A second release does nothing.

        Raises `KvlabError` for a handle of another cache.
        """
        self.prefixes.release(handle)

    def drop_prefixes(self) -> int:
        """Release all handles and free every known block that no sequence uses; how many."""
        return self.prefixes.drop_known() if self.spec.prefix.shares else 0

    def spill_prefixes(self) -> int:
        """Send every known block that nobody uses to the host tier, as if its room were needed.

        Returns how many left the device. Raises `BadInput` without an offload.
        """
        self._refuse_none()
        if not self.spec.offload.keeps:
            raise BadInput("offload", self.spec.offload.name, "keeps nothing; choose offload=host")
        return self.prefixes.spill_known()

    def save(self, folder: str | Path, handles: Sequence[Handle] | None = None) -> Stored:
        """Write what is known, or the prefixes of `handles`, to `folder`; see `store.save`."""
        self._refuse_none()
        if self.recheck(here=False):
            raise KvlabError("the model has changed since the known prefixes were computed: "
                             "nothing of them can be saved")
        self._refuse_outdated(self.sequences.chains, "finish it before saving")
        return store.save(self, folder, handles)

    def load(self, folder: str | Path) -> Stored:
        """Know what another process has saved; see `store.load` for what is refused."""
        self._refuse_none()
        self.recheck()
        return store.load(self, folder)

    def _refuse_none(self) -> None:
        if not self.spec.prefix.shares:
            raise BadInput("prefix", self.spec.prefix.name, "keeps nothing; choose prefix=hash")

    @property
    def prefix_tokens(self) -> int:
        """Tokens of all known blocks, each block counted once."""
        return self.prefixes.known_tokens

    def audit(self, seq: SeqId | None = None) -> list[dict]:
        """Rows saying what requests found: of `seq`, or of all since the cache was made."""
        chosen = self.audits if seq is None else {seq: self.audits[seq]}
        return [audit.row(seq) for seq, audit in chosen.items()]

    # ---- the model may change

    def _named(self, identity: str) -> str:
        return f"{identity} {self.spec.format.identity} {self.dtype}"

    def glance(self) -> None:
        """Before each forward: is the model the same? A quick look; what it doubts is read."""
        if self.facts.moved():
            self.recheck()

    def recheck(self, here: bool = True) -> bool:
        """Read the model in full; whether it has changed since it was read last.

        Then nothing that was computed before is found again, also when the old weights come back:
        handles are released, known blocks freed, and what running sequences compute stays theirs.
        here: under the circumstances of the caller, see `ModelFacts.read`.
        """
        identity = self._named(self.facts.read(here))
        if identity == self.identity:
            return False
        self.renewals += 1
        self.prefixes.renew(identity)
        return True

    def keep_apart(self, seq: SeqId) -> None:
        """The next tokens of `seq` are none that token ids stand for (embeddings, other
        positions): it never becomes known to others."""
        self.prefixes.keep_apart(seq)

    def _refuse_outdated(self, seqs: Iterable[SeqId], action: str) -> None:
        if any(self.prefixes.outdated(seq) for seq in seqs):
            raise KvlabError(f"the model has changed since a running sequence began: {action}")
