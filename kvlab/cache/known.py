"""Prefixes of a live cache in no sequence's name: kept, found, sent to the host, stored on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvlab.blocks import PrefixHandle as Handle
from kvlab.cache import store
from kvlab.cache.layers import Layers
from kvlab.cache.lineage import Lineage
from kvlab.cache.requests import Requests
from kvlab.cache.store import Stored
from kvlab.core import BadInput, KvlabError, SeqId


class Known:
    """What is known beyond the requests that computed it. Needs prefix=hash, and says so."""

    def __init__(self, layers: Layers, requests: Requests, lineage: Lineage):
        self.layers, self.requests, self.lineage = layers, requests, lineage
        self.spec, self.prefixes = layers.spec, lineage.prefixes

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
        self.requests.catch_up()
        self.lineage.recheck()
        if seq is not None:
            self.lineage.refuse_outdated([seq], "nothing of it can be kept")
            self.requests.tell(seq, token_ids, 0)
        return self.prefixes.keep(token_ids, pin)

    def attach_prefix(self, token_ids: Sequence[int]) -> Handle:
        """Find and pin the longest run of whole blocks that is there; possibly none.

        Counts as a use, the tail being the first to leave again. `open(token_ids)` does the same
        for a sequence; this is for keeping a prefix while no sequence uses it.
        """
        self._refuse_none()
        self.lineage.recheck()
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
        if self.lineage.recheck(here=False):
            raise KvlabError("the model has changed since the known prefixes were computed: "
                             "nothing of them can be saved")
        self.lineage.refuse_outdated(self.lineage.sequences.chains, "finish it before saving")
        return store.save(self.layers, self.lineage, folder, handles)

    def load(self, folder: str | Path) -> Stored:
        """Know what another process has saved; see `store.load` for what is refused."""
        self._refuse_none()
        self.lineage.recheck()
        return store.load(self.layers, self.lineage, folder)

    def _refuse_none(self) -> None:
        if not self.spec.prefix.shares:
            raise BadInput("prefix", self.spec.prefix.name, "keeps nothing; choose prefix=hash")

    @property
    def prefix_tokens(self) -> int:
        """Tokens of all known blocks, each block counted once."""
        return self.prefixes.known_tokens
