"""The model that fills a cache may change under it: what `PagedCache` does then."""

from __future__ import annotations

from collections.abc import Iterable

from kvlab.cache.renewal import CutOff
from kvlab.core import KvlabError, SeqId


class Changing:
    """The part of `PagedCache` that asks whether what it knows still has the maker of now.

    Without prefix=hash the answer is given without a look at the model.
    renewals: how many times what was known was dropped since the model had changed.
    """

    renewals = 0

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
        self.identity = identity
        self.renewals += 1
        for handle in list(self._handles):
            self.release_prefix(handle)
        self._chains = {seq: CutOff(self.geometry.block_size, True) for seq in self._chains}
        for group in self.groups:
            group.share.renew(identity, self._chains)
        return True

    def keep_apart(self, seq: SeqId) -> None:
        """The next tokens of `seq` are none that token ids stand for (embeddings, other
        positions): it never becomes known to others."""
        if seq in self._chains and not isinstance(self._chains[seq], CutOff):
            self._chains[seq] = CutOff(self.geometry.block_size)
            for group in self.groups:
                group.share.cut_off(seq, self._chains[seq])

    def _refuse_outdated(self, seqs: Iterable[SeqId], action: str) -> None:
        if any(getattr(self._chains[seq], "outdated", False) for seq in seqs):
            raise KvlabError(f"the model has changed since a running sequence began: {action}")
