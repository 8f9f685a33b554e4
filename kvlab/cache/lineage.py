"""Which model fills a cache: what is known is known of one, and ends when it changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kvlab.blocks import Prefixes, Sequences
from kvlab.cache.facts import ModelFacts
from kvlab.core import KvlabError, SeqId


def named(identity: str, spec, dtype) -> str:
    """What decides which bytes a block of known tokens holds, `identity` being the model's."""
    return f"{identity} {spec.format.identity} {dtype}"


class Lineage:
    """The model that fills a cache may change under it; without prefix=hash nobody looks.

    facts: of that model. renewals: how many times what was known was dropped since it had changed.
    """

    def __init__(self, sequences: Sequences, prefixes: Prefixes, facts: ModelFacts, spec, dtype):
        self.sequences, self.prefixes, self.facts = sequences, prefixes, facts
        self._made_of, self.renewals = (spec, dtype), 0
        self._trusted = False

    @property
    def identity(self) -> str:
        """What decides which bytes a block of known tokens holds."""
        return self.sequences.identity

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
        if self._trusted and not self.facts.moved():
            return False
        identity = named(self.facts.read(here), *self._made_of)
        if identity == self.identity:
            return False
        self.renewals += 1
        self.prefixes.renew(identity)
        return True

    @contextmanager
    def trusting(self) -> Iterator[None]:
        """Within it a driver answers for the model, which it alone runs: its contents are read when
        this begins and ends, and in between only what a glance shows. Reading them takes some
        milliseconds, for which the device has to be waited for, twice a request."""
        self.recheck()
        self._trusted = True
        try:
            yield
        finally:
            self._trusted = False
            self.recheck(here=False)

    def keep_apart(self, seq: SeqId) -> None:
        """The next tokens of `seq` are none that token ids stand for (embeddings, other
        positions): it never becomes known to others."""
        self.prefixes.keep_apart(seq)

    def refuse_outdated(self, seqs: Iterable[SeqId], action: str) -> None:
        if any(self.prefixes.outdated(seq) for seq in seqs):
            raise KvlabError(f"the model has changed since a running sequence began: {action}")
