"""Masks and positions of one call, and which of its outputs mean anything.

A slot remembers for each column [B, n] which token it was, whether the program means it to be
seen, and whether it is sound: a query that saw nothing, or something unsound, has no right answer
(the library gives some number), and what sees it has none either.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .models import PAD, VOCAB


@dataclass(frozen=True)
class Columns:
    """What a cache has seen: ids int64, shown, sound, told and placed bool, each [B, n].

    told: what the mask said of a column when it was computed, shown: what later masks say; placed:
    whether it stands at the number of tokens before it, where the next `generate()` counts from.
    """

    ids: Tensor
    shown: Tensor
    sound: Tensor
    told: Tensor
    placed: Tensor

    @staticmethod
    def empty(rows: int) -> Columns:
        none = torch.zeros(rows, 0)
        return Columns(none.long(), none.bool(), none.bool(), none.bool(), none.bool())

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def map(self, change) -> Columns:
        return Columns(*map(change, self._parts))

    def seen_by(self, flat: Tensor) -> Columns:
        """The same after a mask [B, n or more] that may hide what it showed before: where it does,
        nobody can go on from the cache alone."""
        same = flat[:, : self.length] == self.told
        return self._replaced(self.placed & same.all(1, keepdim=True))

    def _replaced(self, placed: Tensor) -> Columns:
        return Columns(self.ids, self.shown, self.sound, self.told, placed)

    def then(self, *new: Tensor) -> Columns:
        """These columns, and those of `new`: ids, shown, sound, told, placed, each [B, T]."""
        return Columns(*(torch.cat(pair, 1) for pair in zip(self._parts, new, strict=True)))

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.ids, self.shown, self.sound, self.told, self.placed


def words(seed: int, rows: int, tokens: int) -> Tensor:
    """Ids [rows, tokens]; equal seeds begin alike, and with seed 3 all rows are equal."""
    streams = [1000 * seed + (0 if seed == 3 else row) for row in range(rows)]
    drawn = [torch.randint(PAD + 1, VOCAB, (256,), generator=torch.Generator().manual_seed(s))
             for s in streams]  # fmt: skip
    return torch.stack(drawn)[:, :tokens]


def new_part(kind: str, past: Columns, tokens: int, rng: random.Random) -> Tensor:
    """Which new columns are tokens, bool [B, tokens]."""
    part = torch.ones(past.rows, tokens, dtype=torch.bool)
    for row in part:
        if kind.endswith("left"):
            row[: rng.randrange(tokens)] = False
        elif kind == "right":
            row[1 + rng.randrange(tokens) :] = False
        elif kind == "holes":
            row[torch.tensor([rng.random() < 0.3 for _ in range(tokens)])] = False
        elif kind in ("column", "ended"):
            row[:] = rng.random() < 0.5
    return part


def past_part(kind: str, past: Columns, rng: random.Random) -> Tensor:
    """Which columns of the past are seen, bool [B, n]."""
    shown = past.shown.clone()
    if kind == "unhide":
        return torch.ones_like(shown)
    for row in shown:
        if kind == "hide_past":
            row[torch.tensor([rng.random() < 0.3 for _ in row], dtype=torch.bool)] = False
        elif kind == "hide_first":
            row[: rng.randint(0, past.length)] = False
    return shown


@dataclass(frozen=True)
class Plan:
    """mask: what the model gets; seen: bool [B, 1, T, n + T] whom each query sees, the window of a
    layer left out; new: bool [B, T]; valid: bool [B, T], outputs that have to be equal."""

    mask: Tensor | None
    seen: Tensor
    new: Tensor
    flat: Tensor  # bool [B, n + T]: the columns that a 2D mask shows

    def judged(self, past: Columns, windows) -> tuple[Tensor, Columns | None]:
        """Outputs [B, T] with a right answer, and whether each new column is sound."""
        sound = soundness(self.seen, past, windows if self.windowed else {None})
        return sound & self.flat[:, past.length :], sound

    @property
    def windowed(self) -> bool:
        return self.mask is None or self.mask.dim() == 2


def plan(kind: str, past: Columns, tokens: int, rng: random.Random, heads: int) -> Plan:
    """The mask named `kind` over `past` and `tokens` new columns."""
    new = new_part(kind, past, tokens, rng)
    flat = torch.cat([past_part(kind, past, rng), new], 1)
    causal = torch.ones(tokens, flat.shape[1], dtype=torch.bool).tril(past.length)[None, None]
    if "4d" in kind:
        return _plan4d(kind, past, new, flat, causal.expand(past.rows, 1, -1, -1), rng, heads)
    if kind == "none":
        flat = torch.ones_like(flat)
        return Plan(None, causal & flat[:, None, None], new, flat)
    mask = flat.long()
    if kind == "short":
        cut = rng.randint(1, flat.shape[1])
        mask, flat = mask[:, :cut], flat & (torch.arange(flat.shape[1]) < cut)
    elif kind == "long":
        mask = torch.cat([mask, torch.ones(past.rows, rng.randint(1, 3)).long()], 1)
    elif kind == "new_only":
        mask = mask[:, past.length :]
        flat = torch.cat([mask.bool(), torch.zeros(past.rows, past.length).bool()], 1)
    elif kind == "one_row":
        mask, flat = mask[:1], flat[:1].expand_as(flat)
    return Plan(mask, causal & flat[:, None, None], new, flat)


def _plan4d(kind, past, new, flat, causal, rng, heads) -> Plan:
    see = causal & flat[:, None, None]
    noise = torch.rand(see.shape, generator=torch.Generator().manual_seed(rng.randrange(99)))
    if kind.endswith("pattern"):
        see = see & ((noise > 0.3) | torch.eye(*see.shape[2:]).bool().roll(past.length, 1))
    elif kind.endswith("both_ways"):
        see = flat[:, None, None].expand_as(see)
    elif kind.endswith("one_row"):
        see = see[:1]
    elif kind.endswith("heads"):
        see = see.expand(-1, heads, -1, -1).clone()
        see[:, 0] &= noise[:, 0] > 0.4
    elif kind.endswith("new_only"):
        see = see[..., past.length :]
    mask = see
    if kind.startswith("float"):
        bias = -3 * noise if kind.endswith("bias") else torch.zeros_like(noise)
        mask = torch.where(see, bias, torch.finfo(torch.float32).min)
    return Plan(mask, see.expand(past.rows, -1, -1, -1), new, flat)


def soundness(seen: Tensor, past: Columns, windows) -> Tensor:
    """Which of the new columns [B, T] have a right answer, whatever the layer's window.

    A query needs somebody to see, in each head and layer, and nobody unsound among them; of an
    unsound column only keys and values that nobody sees stay without effect.
    """
    tokens, whole = seen.shape[-2:]
    sound = torch.cat([past.sound, torch.ones(past.rows, tokens, dtype=torch.bool)], 1)
    if whole != sound.shape[1]:
        return sound[:, past.length :]  # the library refuses it
    distance = torch.arange(tokens)[:, None] + past.length - torch.arange(whole)
    views = [seen if w is None else seen & (distance < w) for w in windows]
    while True:
        found = torch.ones(past.rows, tokens, dtype=torch.bool)
        for view in views:
            found &= (view.any(-1) & ~(view & ~sound[:, None, None]).any(-1)).all(1)
        if bool((found == sound[:, past.length :]).all()):
            return found
        sound = torch.cat([past.sound, found & sound[:, past.length :]], 1)


def positions(kind: str, past: Columns, plan: Plan) -> Tensor | None:
    """Position ids of the new columns, int64 [B, T] or [1, T]; None for the model's own."""
    rows, tokens = plan.new.shape
    plain = torch.arange(past.length, past.length + tokens)[None]
    if kind == "default":
        return None
    if kind == "row":
        return plain
    if kind in ("cumsum", "ones_for_pads"):
        if past.length + tokens != plan.flat.shape[1]:
            return plain
        counted = plan.flat.long().cumsum(1) - 1
        fill = 1 if kind == "ones_for_pads" else 0
        return counted.masked_fill(~plan.flat, fill).clamp(min=0)[:, -tokens:]
    if kind == "shifted":
        return plain.expand(rows, -1) + 7
    if kind == "repeated":
        return (plain // 2).expand(rows, -1)
    if kind == "packed":
        return torch.arange(tokens)[None].expand(rows, -1) % max(1, (tokens + 1) // 2)
    return plain.expand(rows, -1)


def placed(kind: str, past: Columns, plan: Plan) -> Tensor:
    """Which of the new columns stand at the number of tokens before them, bool [B, T]."""
    tokens = plan.new.shape[1]
    if past.length + tokens != plan.flat.shape[1]:
        return torch.zeros_like(plan.new)
    at = positions("row" if kind == "default" else kind, past, plan)
    counted = plan.flat.long().cumsum(1)[:, -tokens:] - 1
    return (at == counted) | ~plan.flat[:, -tokens:]


def cropped(columns: Columns, length: int) -> Columns:
    return columns.map(lambda x: x[:, :length])


def blurred(columns: Columns, rows: Tensor) -> Columns:
    """Nothing of `rows` (bool [B]) is sound any more."""
    return replace(columns, sound=columns.sound & ~rows[:, None])
