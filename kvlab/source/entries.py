"""What stands for evicted tokens: entries of each sequence and layer, between evict and attend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvlab.core import BadInput, BlockId, CacheGeometry, KvlabError, SeqId
from kvlab.format import KVFormat
from kvlab.pool import BlockPool
from kvlab.source.base import Ask, Part, Source
from kvlab.source.step import Extent
from kvlab.summary import Entries, NoSummary, Queries
from kvlab.summary.base import tokens

OBSERVED_QUERIES = 128  # of each query head, evenly from
OBSERVED_SPAN = 256     # as many tokens at the end of a step: those to come are most like them
PIECE_TOKENS = 4096     # of what is evicted, read and summarized at a time
STORED = torch.bfloat16


@dataclass(slots=True)
class Story:
    """The summary of one sequence.

    entries, queries: by layer. ends: by entry, the same in all layers: one past the last position
    of what it stands for. seen: tokens evicted so far.
    """

    entries: dict[int, Entries] = field(default_factory=dict)
    queries: dict[int, Queries] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    seen: int = 0


class Summaries(Source):
    """Entries of one layer group, made by `summary` while victims can still be read.

    Keys, values and queries are kept in bf16, biases and sums in fp32. Entries are never written
    in place, so a fork shares them until one of the two evicts.
    """

    def __init__(self, summary: NoSummary, pool: BlockPool):
        self.summary, self.pool = summary, pool
        self.stories: dict[SeqId, Story] = {}
        self.fallbacks = 0  # of the member, made here
        self._metered = 0  # bytes of entries that the pool's meter knows of
        # of the sequences of the step under way, the queries that were kept before it
        self._before: dict[SeqId, dict[int, Queries]] = {}

    @property
    def obstacle(self) -> str:
        name = self.summary.name
        return f"summary={name} makes new entries whenever blocks leave" * self.summary.makes

    def __setstate__(self, state: dict) -> None:
        """A copy tells its own meter what it holds."""
        vars(self).update(state, _metered=0)
        self._tell_meter()

    # ---- the life of a sequence

    def open(self, seq: SeqId) -> None:
        self.stories[seq] = Story()

    def close(self, seq: SeqId) -> None:
        del self.stories[seq]
        self._before.pop(seq, None)
        self._tell_meter()

    def commit(self, e: Extent) -> None:
        self._before.pop(e.seq, None)

    def abort(self, e: Extent) -> None:
        if e.seq in self._before:
            self.stories[e.seq].queries = self._before.pop(e.seq)

    def fork(self, parent: SeqId, child: SeqId) -> None:
        old = self.stories[parent]
        self.stories[child] = Story(
            dict(old.entries), dict(old.queries), list(old.ends), old.seen
        )

    def crop(self, seq: SeqId, length: int) -> None:
        """Drop entries that stand for any token from `length` on."""
        story = self.stories[seq]
        kept = [i for i, end in enumerate(story.ends) if end <= length]
        if len(kept) == len(story.ends):
            return
        story.ends = [story.ends[i] for i in kept]
        story.entries = {
            layer: Entries(*(x[kept] for x in entries)) for layer, entries in story.entries.items()
        } if kept else {}
        self._tell_meter()

    # ---- eviction

    def spill(self, seq: SeqId, indices: list[int], blocks: list[BlockId]) -> None:
        """Summarize `blocks`, the sequence's blocks at `indices`, which are about to be freed."""
        if not self.summary.makes:
            return
        step = max(1, PIECE_TOKENS // self.pool.geometry.block_size)
        for at in range(0, len(blocks), step):
            piece = slice(at, at + step)
            self._spill(self.stories[seq], indices[piece][-1], blocks[piece])
            self._tell_meter()

    def _spill(self, story: Story, last: int, blocks: list[BlockId]) -> None:
        size = self.pool.geometry.block_size
        story.seen += len(blocks) * size
        for layer in range(self.pool.geometry.layers):
            # a copy: what the pool reads may lie in a workspace that the next piece overwrites
            k, v = (x.to(STORED, copy=True) for x in self.pool.read(layer, blocks))
            story.entries[layer], stable = self._absorbed(story, layer, tokens(k, v))
        count = story.entries[0].count
        end = max([(last + 1) * size, *story.ends[stable:]])
        story.ends = story.ends[:stable] + [end] * (count - stable)

    def _absorbed(self, story: Story, layer: int, new: Entries) -> tuple[Entries, int]:
        old, queries = story.entries.get(layer), story.queries.get(layer)
        queries = queries and Queries(queries.q.float(), queries.lse)
        before = self.summary.fallbacks
        entries, stable = self.summary.absorb(old, new, story.seen, queries)
        self.fallbacks += self.summary.fallbacks - before
        return entries.to(STORED), stable

    # ---- attention

    def observe(self, ask: Ask, lse: Tensor) -> None:
        """Keep the last of the step's queries, with `lse` [Hq, T] of all they saw."""
        seq, count, q = ask.extent.seq, ask.q.shape[1], ask.q
        story = self.stories[seq]
        self._before.setdefault(seq, dict(story.queries))
        first = max(0, count - OBSERVED_SPAN)
        wanted = min(OBSERVED_QUERIES, count)
        at = torch.linspace(first, count - 1, wanted, device=q.device).round().long()
        fresh = Queries((q[:, at].float() * ask.scale).to(STORED), lse[:, at])
        old = story.queries.get(ask.layer)
        story.queries[ask.layer] = grouped(fresh, old, self.pool.geometry.kv_heads)

    def parts(self, ask: Ask) -> Iterator[Part]:
        if ask.window is not None:
            raise BadInput("summary", self.summary.name, "cannot tell which entries a model's "
                           "sliding window still sees; use summary=none with this model")
        entries = self.stories[ask.extent.seq].entries.get(ask.layer)
        if entries is not None:
            yield Part(entries.k, entries.v, bias=entries.bias)

    # ---- accounts

    @property
    def blocks(self) -> float:
        """Entries of all sequences, in blocks that take as many bytes."""
        return self.nbytes / self.pool.format.block_bytes(self.pool.geometry)

    @property
    def gain(self) -> float:
        """Blocks' worth of bytes that evicting one block saves, its entries taken off."""
        return 1.0 - entry_share(self.summary, self.pool.format, self.pool.geometry)

    def check(self) -> None:
        """Raise if a layer has other entries than the rest, or any that is not finite."""
        for seq, story in self.stories.items():
            for layer, entries in story.entries.items():
                if entries.count != len(story.ends):
                    raise KvlabError(f"layer {layer} of sequence {seq} has {entries.count} "
                                     f"entries, not {len(story.ends)}")
                if not all(bool(x.isfinite().all()) for x in entries):
                    raise KvlabError(f"an entry of layer {layer}, sequence {seq} is not finite")

    @property
    def nbytes(self) -> int:
        """Of all sequences; what forks share counts once."""
        return self._bytes(e for s in self.stories.values() for e in s.entries.values())

    def _tell_meter(self) -> None:
        held = self.nbytes
        self.pool.meter.add(held - self._metered)
        self._metered = held

    @property
    def workspace_nbytes(self) -> int:
        """The observed queries: as many for a long past as for a short one."""
        return self._bytes(q for s in self.stories.values() for q in s.queries.values())

    @staticmethod
    def _bytes(held) -> int:
        return sum({x.data_ptr(): x.nbytes for part in held for x in part}.values())


def check_summary(spec, g: CacheGeometry) -> None:
    """Raises `BadInput` for axes of a `CacheSpec` beside which a summary makes no sense."""
    name, frees = spec.summary.name, spec.window.protected(1) and not spec.window.middle
    if not spec.summary.makes:
        return
    if not spec.member.evicts and not frees:
        raise BadInput("summary", name, "stands for evicted tokens and none are evicted; choose a "
                       "policy with a budget, or window.middle=false")
    if spec.prefix.shares and spec.prefix.hold:
        raise BadInput("summary", name, "stands for evicted tokens of a sequence, and prefix.hold "
                       "keeps those while it runs; give prefix.hold=false")
    if any(shape.softcap is not None for shape in g.shapes):
        raise BadInput("summary", name, "answers queries by plain logits, and this model caps its "
                       "own softly; use summary=none with this model")
    if any(shape.window is not None for shape in g.shapes):
        raise BadInput("summary", name, "cannot tell which entries a model's sliding window still "
                       "sees; use summary=none with this model")
    if spec.window.rerotate:
        raise BadInput("summary", name, "stands for tokens at their original positions, which "
                       "window.rerotate=true gives up; leave out one of the two")
    percent = 100 * entry_share(spec.summary, spec.format, g)
    if percent >= min(100, spec.budget_percent or 100):
        raise BadInput("summary.ratio", spec.summary.ratio, f"makes entries of {percent:.3g} % of "
                       "the evicted bytes, which leaves no room for blocks in the budget")


def entry_share(summary: NoSummary, format: KVFormat, g: CacheGeometry) -> float:
    """Bytes of the entries of an evicted block over the bytes of the block."""
    if not summary.makes:
        return 0.0
    biases = torch.float32.itemsize * sum(shape.kv_heads for shape in g.shapes)
    entry = g.elements_per_token * STORED.itemsize + biases
    return summary.ratio * g.block_size * entry / format.block_bytes(g)


def grouped(fresh: Queries, old: Queries | None, kv_heads: int) -> Queries:
    """[Hq, t, ..] folded to [H, group * m, ..]: the last m tokens, older ones from `old`."""
    q, lse = (x.unflatten(0, (kv_heads, -1)) for x in fresh)
    if old is not None and q.shape[2] < OBSERVED_QUERIES:
        shape, room = (q.shape[1], -1), OBSERVED_QUERIES - q.shape[2]
        q, lse = (
            torch.cat([x.unflatten(1, shape)[:, :, -room:], y], 2)
            for x, y in zip(old, (q, lse))
        )
    return Queries(q.flatten(1, 2), lse.flatten(1, 2))
