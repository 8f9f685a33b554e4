"""The sources of one layer group: who lives with its sequences, and who is read, in which order."""

from __future__ import annotations

from torch import Tensor

from kvlab.blocks import BlockTable
from kvlab.core import KvlabError, SeqId
from kvlab.pool import BlockPool
from kvlab.source.base import Source, overriding
from kvlab.source.chosen import Choice
from kvlab.source.digests import Digests
from kvlab.source.entries import Summaries
from kvlab.source.heads import HeadSealed
from kvlab.source.host import Host
from kvlab.source.sealed import Sealed
from kvlab.source.tail import Tail

LIFE = ("open", "fork", "crop", "close", "begin", "sealing", "commit", "abort", "tell")
READING = ("observe", "prepare", "widen")


class Sources(Source):
    """What the axes of `spec` put together; several sources live as one.

    tables: the group's block tables. readers: what attention goes over, those that can be empty
    for good left out. past: what stands for the sealed past, with retrieval the choice. observed:
    whether any source wants to know what a layer's queries found in all; hears: that, or the keys
    of blocks that a chunk fills. plain: whether a step of
    single tokens reads sealed blocks and open tails alone.
    """

    def __init__(
        self, spec, pool: BlockPool, tables: dict[SeqId, BlockTable], inv_freq: Tensor | None
    ):
        segment = max(1, spec.workspace_tokens // pool.block_size)
        self.entries = Summaries(spec.summary, pool)
        kind = HeadSealed if pool.by_head else Sealed
        self.sealed = kind(pool, tables, spec.window, segment, inv_freq)
        self.host = Host(spec.offload.build(pool), pool, self.sealed, self.entries)
        self.tail = Tail(pool)
        self.past, self.digests = self.sealed, Source()
        stored = [self.host, self.sealed] if spec.offload.keeps else [self.sealed]
        self.readers, self._beside = [*stored], []
        if spec.retrieval.selects and pool.shape.window is None:  # else all it sees is near
            self.digests = Digests(spec.retrieval, self.host)
            self.past = Choice(self.digests)
            self.readers, self._beside = [self.past], [*stored, self.digests]
        self.readers += [self.entries] * spec.summary.makes + [self.tail]
        # empty for good, but others look into their tables
        self._idle = [s for s in (self.host, self.entries) if s not in (*stored, *self.readers)]
        self._note_verbs()

    def _note_verbs(self) -> None:
        self.decoders = [source for source in self.readers if source is not self.tail]
        self._read = [*self.readers, *self._beside]
        self._all = [*self._read, *self._idle]
        self._doing = {verb: overriding(self._all, verb) for verb in LIFE}
        self._doing |= {verb: overriding(self._read, verb) for verb in READING}
        self.observed = bool(self._doing["observe"])
        self.hears = self.observed or bool(self._doing["sealing"])
        self.plain = self.decoders == [self.sealed] and not self.observed

    def add(self, source: Source) -> None:
        """Have attention read one more source, before any sequence is open."""
        if self.host.tables.of:
            raise KvlabError("a source joins a cache before its first sequence is opened")
        self.readers.append(source)
        self._note_verbs()

    def __iter__(self):
        return iter(self._all)

    # ---- the life of a sequence

    def open(self, seq):
        for source in self._doing["open"]:
            source.open(seq)

    def fork(self, parent, child):
        for source in self._doing["fork"]:
            source.fork(parent, child)

    def crop(self, seq, length):
        for source in self._doing["crop"]:
            source.crop(seq, length)

    def close(self, seq):
        for source in self._doing["close"]:
            source.close(seq)

    # ---- a step

    def begin(self, e):
        for source in self._doing["begin"]:
            source.begin(e)

    def sealing(self, layer, e, k):
        for source in self._doing["sealing"]:
            source.sealing(layer, e, k)

    def commit(self, e):
        for source in self._doing["commit"]:
            source.commit(e)

    def abort(self, e):
        for source in self._doing["abort"]:
            source.abort(e)

    def tell(self, watch):
        return [place for source in self._doing["tell"] for place in source.tell(watch)]

    def observe(self, ask, lse):
        for source in self._doing["observe"]:
            source.observe(ask, lse)

    def widen(self, rows, blocks):
        for source in self._doing["widen"]:
            source.widen(rows, blocks)

    def prepare(self, extents, rows):
        for source in self._doing["prepare"]:
            source.prepare(extents, rows)

    def in_place(self):
        return [x for source in self._read for x in source.in_place()]

    # ---- accounts

    @property
    def obstacle(self) -> str:
        return next((source.obstacle for source in self.readers if source.obstacle), "")

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self._all)

    @property
    def host_nbytes(self) -> int:
        return sum(source.host_nbytes for source in self._all)

    @property
    def digest_nbytes(self) -> int:
        return sum(source.digest_nbytes for source in self._all)

    @property
    def digest_used_nbytes(self) -> int:
        return sum(source.digest_used_nbytes for source in self._all)

    @property
    def workspace_nbytes(self) -> int:
        return sum(source.workspace_nbytes for source in self._all)
