"""What transformers counts of a batch: columns. The cache stores those of them that are tokens.

A rectangle of ids has padding, and the library keeps it: its caches hold keys of padding that
masks hide. Here padding is never stored. So what a mask says must be compared with what is there:
columns hidden from the start were padding; a tail that is hidden later is forgotten; anything else
cannot be followed and is refused.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvlab.core import KvlabError


class Look(NamedTuple):
    """Queries of padding that see tokens: their columns [P] in the step, and how many of the
    step's tokens in their row come before each, [P]."""

    row: int
    columns: np.ndarray
    before: np.ndarray


class Plan(NamedTuple):
    """One forward of T columns.

    real: bool [B, T], None if all are tokens. counts: tokens of each row. order: [B, T], the
    columns with padding first, None if they stand so. looks: see `Look`. keep: row -> how many of
    its stored tokens the mask still shows, where these are not all.
    """

    tokens: int
    counts: list[int]
    real: np.ndarray | None = None
    order: np.ndarray | None = None
    looks: tuple[Look, ...] = ()
    keep: dict[int, int] = {}


class Columns:
    """The columns that the `rows` rows of a batch have seen.

    seen: how many, the same for all. real: bool [rows, seen], which of them are tokens; None while
    all are. Positions of tokens are what the caller said; `next_positions` are those that follow.
    """

    def __init__(self, rows: int, seen: int = 0, real: np.ndarray | None = None):
        self.rows, self.seen = rows, seen
        self._held: np.ndarray | None = None  # bool [rows, seen or more]: grown seldom
        self.real = real
        self._ends: Tensor | list[int] | None = [int(n) for n in self.lengths()]
        self._following: Tensor | None = None  # positions that follow, as they were asked for last
        self._odd: Tensor | bool = False  # whether positions of a row ever leapt

    @property
    def real(self) -> np.ndarray | None:
        """Bool [rows, seen], which columns are tokens; None while all are."""
        return None if self._held is None else self._held[:, : self.seen]

    @real.setter
    def real(self, real: np.ndarray | None) -> None:
        self._held = None if real is None or real.all() else real.copy()

    @classmethod
    def padded(cls, lengths: list[int], seen: int) -> Columns:
        """Rows of so many tokens behind padding."""
        return cls(len(lengths), seen, np.arange(seen) >= seen - np.array(lengths)[:, None])

    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.full(self.rows, self.seen) if self._held is None else self.real.sum(1)

    # ---- a forward

    def plan(self, real: np.ndarray | None, tokens: int) -> Plan:
        """What a forward of `tokens` columns does, if `real` [rows, seen + tokens] are the tokens.

        Raises `KvlabError` where the past is not what this cache holds.
        """
        if real is None:
            if self._held is not None:
                raise KvlabError("the past of this batch has padding, and no attention mask came "
                                 "that hides it; give attention_mask over past and new tokens")
            return Plan(tokens, [tokens] * self.rows)
        keep = self._kept(real[:, : self.seen])
        new = real[:, self.seen :]
        counts = [int(n) for n in new.sum(1)]
        return Plan(tokens, counts, None if new.all() else new, _order(new),
                    tuple(self._looks(new, real[:, : self.seen])), keep)

    def _kept(self, shown: np.ndarray) -> dict[int, int]:
        there = np.ones_like(shown) if self.real is None else self.real
        if (shown & ~there).any():
            row, column = np.argwhere(shown & ~there)[0]
            raise KvlabError(f"the attention mask shows column {column} of row {row}, which was "
                             "hidden before and is not in the cache: padding is not stored")
        keep = {}
        for row in np.flatnonzero((there & ~shown).any(1)):
            tokens = shown[row, there[row]]
            keep[int(row)] = count = int(tokens.sum())
            if not tokens[:count].all():
                raise KvlabError(f"the attention mask hides tokens of row {row} that are in the "
                                 "cache and shows later ones; a PagedCache forgets only the last "
                                 "tokens of a row")
        return keep

    def _looks(self, new: np.ndarray, past: np.ndarray):
        """Padding of a first turn on the left sees nothing, and nobody asks for it."""
        for row in np.flatnonzero(~new.all(1)):
            before = new[row].cumsum()
            sees = ~new[row] & ((before > 0) | past[row].any())
            if sees.any():
                columns = np.flatnonzero(sees)
                yield Look(int(row), columns, before[columns])

    def hide(self, keep: dict[int, int]) -> None:
        """Only the first `keep[row]` tokens of these rows are there any more."""
        if not keep:
            return
        gone = self.lengths()
        self._materialize()
        for row, count in keep.items():
            at = np.flatnonzero(self.real[row])
            self._held[row, at[count:]] = False
        self._step_back(gone - self.lengths())

    def advance(self, plan: Plan, positions: Tensor | None = None) -> None:
        """The columns of `plan` are there; positions [1 or B, T], by default those that follow."""
        if plan.real is not None or self._held is not None:
            self._materialize(plan.tokens)
            new = slice(self.seen, self.seen + plan.tokens)
            self._held[:, new] = True if plan.real is None else plan.real
        self.seen += plan.tokens
        following, self._following = self._following, None
        if positions is None or positions is following:  # known on the host: nobody waits
            self._ends = [end + n for end, n in zip(self.next_positions(), plan.counts)]
        else:
            self._note_positions(plan, positions)

    def _note_positions(self, plan: Plan, positions: Tensor) -> None:
        """On the positions' device, so that nobody waits for them."""
        device, unknown = positions.device, self._ends is None
        positions = positions.expand(self.rows, -1)
        if plan.order is not None:
            positions = positions.gather(1, torch.from_numpy(plan.order).to(device))
        whole, width = plan.real is None, positions.shape[1]  # mostly, and nothing is looked up
        first, ends = positions[:, 0], positions[:, -1] + 1
        before = ends if unknown else torch.as_tensor(self._ends, device=device)
        steps = positions.diff() != 1 if width > 1 else None
        if not whole:
            counts = torch.tensor(plan.counts, device=device)
            first = positions.gather(1, (width - counts).clamp(max=width - 1)[:, None])[:, 0]
            ends = torch.where(counts > 0, ends, before)
            if steps is not None:
                steps &= torch.arange(1, width, device=device) > (width - counts)[:, None]
        counts, leapt = np.array(plan.counts), first != before
        goes_on = (counts > 0) & (self.lengths() > counts)
        if not goes_on.all():
            leapt = leapt & torch.from_numpy(goes_on).to(device)
        leapt = leapt.any() | unknown
        self._odd = self._odd | (leapt if steps is None else leapt | steps.any())
        self._ends = ends

    def next_positions(self) -> list[int]:
        """The position after the last token of each row, 0 for a row without any.

        Raises `KvlabError` where a crop took tokens whose positions had not come one by one.
        """
        if self._ends is None:
            raise KvlabError("positions of this batch did not come one by one, so those that "
                             "follow a crop are not known; give position_ids, or a new cache")
        if isinstance(self._ends, Tensor):
            self._ends = self._ends.tolist()
        return self._ends

    # ---- operations on the batch

    def left(self, columns: int) -> np.ndarray:
        """Tokens of each row that remain when the last `columns` columns go."""
        stop = max(0, self.seen - columns)
        return np.full(self.rows, stop) if self.real is None else self.real[:, :stop].sum(1)

    def crop(self, columns: int) -> None:
        """Forget the last `columns` columns."""
        before = self.lengths()
        self.seen = max(0, self.seen - columns)
        self.real = self.real
        self._step_back(before - self.lengths())

    def _step_back(self, tokens: np.ndarray) -> None:
        """Positions of so many tokens are gone; they can be told where they came one by one."""
        if not tokens.any():
            return
        if self._ends is None or bool(self._odd):
            self._ends = None
            return
        lengths, ends = self.lengths(), np.array(self.next_positions())
        self._ends = [int(n) for n in np.where(lengths > 0, ends - tokens, 0)]

    def select(self, sources: list[int]) -> None:
        """Row i becomes what row `sources[i]` was."""
        self.rows = len(sources)
        if self._ends is not None:
            ends = self.next_positions()
            self._ends = [ends[s] for s in sources]
        if self.real is not None:
            self.real = self.real[sources]

    def mask(self, new: Tensor | None, tokens: int, device) -> Tensor | None:
        """The library's mask over past and `tokens` new columns, int64 [rows, seen + tokens].

        new: which of them are tokens, [rows, tokens]; None: all. None where nothing is hidden.
        """
        if self.real is None and (new is None or bool(new.all())):
            return None
        past = np.ones((self.rows, self.seen), bool) if self.real is None else self.real
        past = torch.from_numpy(past).to(device, torch.long)
        new = past.new_ones(self.rows, tokens) if new is None else new.to(device, torch.long)
        return torch.cat([past, new], 1)

    def positions(self, new: Tensor | None, tokens: int, device) -> Tensor:
        """Position of each new column, [rows, tokens]; padding gets that of the token before."""
        first = torch.tensor(self.next_positions()).to(device, non_blocking=True)[:, None]
        if new is None:
            self._following = first + torch.arange(tokens, device=device)
            return self._following
        return (first + new.to(device).long().cumsum(1) - 1).clamp(min=0)

    def interior(self, plan: Plan) -> bool:
        """Whether, after `plan`, a row has padding behind a token."""
        if self._held is None and plan.real is None:
            return False
        parts = [np.ones((self.rows, n), bool) if r is None else r
                 for n, r in ((self.seen, self.real), (plan.tokens, plan.real))]
        real = np.concatenate(parts, 1)
        return bool((real[:, :-1] & ~real[:, 1:]).any())

    def _materialize(self, more: int = 0) -> None:
        """A record of all columns, with room for `more`."""
        if self._held is None or self._held.shape[1] < self.seen + more:
            real, room = self.real, self.seen + self.seen // 8 + more
            self._held = np.ones((self.rows, room), bool)
            self._held[:, : self.seen] = True if real is None else real


def _order(new: np.ndarray) -> np.ndarray | None:
    """Columns of each row with padding first; None where they stand so."""
    if not (new[:, 1:] < new[:, :-1]).any():
        return None
    return np.argsort(new, axis=1, kind="stable")
