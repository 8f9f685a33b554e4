"""Prefixes that outlive their sequences: what `PagedCache` does with `prefix=hash`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvlab.blocks import Chain
from kvlab.blocks import PrefixHandle as Handle
from kvlab.cache import store
from kvlab.cache.audit import Audit, audited
from kvlab.cache.changing import Changing
from kvlab.cache.claim import Alone
from kvlab.cache.facts import ModelFacts
from kvlab.cache.share import Serving, Shared
from kvlab.cache.store import Stored
from kvlab.core import BadInput, KvlabError, SeqId
from kvlab.sim.service import recompute_cost
from kvlab.sim.sizes import ModelShape
from kvlab.source import Extent


class Prefixes(Changing):
    """The part of `PagedCache` that finds, keeps, releases and accounts for shared prefixes."""

    def _start_sharing(self, facts: ModelFacts) -> None:
        """Give every layer group its way of holding blocks; `self.groups` is made."""
        g, self.facts = self.geometry, facts
        self.shape = ModelShape.of(g, facts.parameters)
        self.identity = self._named(facts.identity)
        self._chains: dict[SeqId, Chain] = {}
        self._handles: list[Handle] = []
        self._late: list[tuple[list[tuple[SeqId, int]], Tensor]] = []
        self.audits: dict[SeqId, Audit] = {}
        for group in self.groups:
            group.share = self._share(group)
            if group.share.hold:  # a block is used when a request begins with it
                group.watch.touches = False
                group.watch.active &= group.ledger.policy.scored

    def _share(self, group) -> Alone:
        member = self.spec.prefix
        if not member.shares:
            return Alone(group)
        cost = recompute_cost(self.shape, self.geometry.block_size)
        reads_part = self.spec.retrieval.selects
        kind = Serving if member.hold else Shared
        return kind(group, self.identity, member.outputs, reads_part, cost)

    # ---- sequences

    def _chain(self, token_ids: Sequence[int]) -> Chain | None:
        if not self.spec.prefix.shares:
            return None
        if isinstance(token_ids, Chain):
            return token_ids
        return Chain(self.identity, self.geometry.block_size, token_ids)

    def _hit(self, chain: Chain | None) -> tuple[int, int]:
        """Leading whole blocks that every group holds on the device, and there or on the host.

        The last token is never among them.
        """
        if chain is None or not chain.tokens:
            return 0, 0
        most = (chain.tokens - 1) // self.geometry.block_size
        near = min(most, *(leading(group.share.found(chain)) for group in self.groups))
        return near, min(most, *(group.share.reach(chain) for group in self.groups))

    def open_together(self, prompts: Sequence[Sequence[int]], pads: Sequence[int]) -> list[SeqId]:
        """A sequence for each prompt, such that pad plus length is the same for all of them."""
        size = self.geometry.block_size
        self.recheck()
        prompts = [self._chain(ids) for ids in prompts]
        hits = [self._hit(chain)[1] for chain in prompts]
        common = min((p + n * size for p, n in zip(pads, hits)), default=0)
        even = all(p <= common and (common - p) % size == 0 for p in pads)
        most = [(common - p) // size if even else 0 for p in pads]
        rows: list[SeqId] = []
        try:
            for chain, blocks in zip(prompts, most):
                rows.append(self.open(chain, most=blocks))
        except Exception:
            for row in rows:
                self.close(row)
            raise
        return rows

    def _open(
        self, seq: SeqId, token_ids: Sequence[int], reserve: int, most: int | None = None
    ) -> int:
        """Open `seq` in all groups or in none; returns the tokens that are there already."""
        if len(token_ids) and not isinstance(token_ids, Chain):
            self.recheck()
        chain, size = self._chain(token_ids), self.geometry.block_size
        near, hit = (n if most is None else min(n, most) for n in self._hit(chain))
        audit = audited(self, chain, near, hit)
        for group in self.groups:
            group.open(seq, chain, near)
        try:
            for group in self.groups:
                group.share.reserve(seq, near, max(hit, -(-reserve // size)))
            for group in self.groups if hit > near else ():
                group.share.bring(seq, near, hit)
            for group in self.groups:
                group.share.opened(seq)
        except Exception:
            for group in self.groups:
                group.close(seq, done=False)
            raise
        if chain is not None:
            self._chains[seq], self.audits[seq] = chain, audit
        return hit * size

    def _note_holes(self, step: list[list[Extent]]) -> None:
        """A hole in one layer shows in what all layers above it hold."""
        for extents in step if self.spec.prefix.shares else ():
            whole = extents[0].past // self.geometry.block_size
            saw_all = all(group.whole(extents[0].seq, whole) for group in self.groups)
            for e in extents:
                e.saw_all = saw_all

    def tell(self, seq: SeqId, token_ids: Sequence[int], at: int | None = None) -> None:
        """Say which tokens the next steps of `seq` compute: only known tokens can be shared.

        at: position of the first of them (the next), for a driver that knows them later.
        """
        if seq in self._chains:
            self._chains[seq].tell(self._tokens[seq] if at is None else at, token_ids)

    def tell_later(self, places: list[tuple[SeqId, int]], tokens: Tensor) -> None:
        """The same of a token of each (sequence, position), tokens [B] on the device: looked at
        when somebody has to know."""
        self._late.append((places, tokens))

    def catch_up(self) -> None:
        """Hear of what was told late."""
        late, self._late = self._late, []
        tokens = torch.cat([tokens for _, tokens in late]).tolist() if late else ()
        places = [place for places, _ in late for place in places]
        for (seq, at), token in zip(places, tokens):
            self.tell(seq, [token], at)

    # ---- handles

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
            self._chains[seq].tell(0, token_ids)
        for known, chain in self._chains.items():
            if chain.starts_with(token_ids) >= self.geometry.block_size:
                for group in self.groups:
                    group.share.publish(known)
        return self._handle(token_ids, pin)

    def attach_prefix(self, token_ids: Sequence[int]) -> Handle:
        """Find and pin the longest run of whole blocks that is there; possibly none.

        Counts as a use, the tail being the first to leave again. `open(token_ids)` does the same
        for a sequence; this is for keeping a prefix while no sequence uses it.
        """
        self._refuse_none()
        self.recheck()
        handle = self._handle(token_ids, True)
        for group, ids in zip(self.groups, handle.parts):
            group.ledger.touch(ids[::-1])
        return handle

    def _handle(self, token_ids: Sequence[int], pin: bool) -> Handle:
        chain = self._chain(token_ids)
        found = [group.share.found(chain) for group in self.groups]
        count = min(map(leading, found))
        parts, tokens = [ids[:count] for ids in found], count * self.geometry.block_size
        handle = Handle(parts, tokens, pin, self.identity)
        if pin:
            for group, ids in zip(self.groups, handle.parts):
                group.ledger.pin(ids)
            self._handles.append(handle)
        return handle

    def release_prefix(self, handle: Handle) -> None:
        """Unpin a handle's blocks, tail first. A second release does nothing.

        Raises `KvlabError` for a handle of another cache.
        """
        if handle.pinned:
            if handle not in self._handles:
                raise KvlabError("this prefix was not pinned in this cache; release it where "
                                 "it was attached")
            handle.pinned = False
            self._handles.remove(handle)
            for group, ids in zip(self.groups, handle.parts):
                group.ledger.unpin(ids[::-1])

    def drop_prefixes(self) -> int:
        """Release all handles and free every known block that no sequence uses; how many."""
        for handle in list(self._handles):
            self.release_prefix(handle)
        for group in self.groups:
            group.share.forget_host()
        return sum(group.drop_known() for group in self.groups)

    def save(self, folder: str | Path, handles: Sequence[Handle] | None = None) -> Stored:
        """Write what is known, or the prefixes of `handles`, to `folder`; see `store.save`."""
        self._refuse_none()
        if self.recheck(here=False):
            raise KvlabError("the model has changed since the known prefixes were computed: "
                             "nothing of them can be saved")
        self._refuse_outdated(self._chains, "finish it before saving")
        return store.save(self, folder, handles)

    def load(self, folder: str | Path) -> Stored:
        """Know what another process has saved; see `store.load` for what is refused."""
        self._refuse_none()
        self.recheck()
        return store.load(self, folder)

    def spill_prefixes(self) -> int:
        """Send every known block that nobody uses to the host tier, as if its room were needed.

        Returns how many left the device. Raises `BadInput` without an offload.
        """
        self._refuse_none()
        if not self.spec.offload.keeps:
            raise BadInput("offload", self.spec.offload.name, "keeps nothing; choose offload=host")
        return sum(group.drop_known(spill=True) for group in self.groups)

    def _refuse_none(self) -> None:
        if not self.spec.prefix.shares:
            raise BadInput("prefix", self.spec.prefix.name, "keeps nothing; choose prefix=hash")

    # ---- accounts

    @property
    def prefix_tokens(self) -> int:
        """Tokens of all known blocks, each block counted once."""
        known = min(len(group.share.known) for group in self.groups)
        return known * self.geometry.block_size

    def audit(self, seq: SeqId | None = None) -> list[dict]:
        """Rows saying what requests found: of `seq`, or of all since the cache was made."""
        chosen = self.audits if seq is None else {seq: self.audits[seq]}
        return [audit.row(seq) for seq, audit in chosen.items()]


def leading(found: list) -> int:
    """How many blocks are held before the first gap."""
    return next((i for i, block in enumerate(found) if block is None), len(found))
