"""Verdicts: equal, refused with a sentence, or a failure."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import kvlab
from kvlab.core import KvlabError

TOLERANCE, TIE = 1e-4, 1e-3
HOME = Path(kvlab.__file__).parent


class Verdict(NamedTuple):
    """kind: equal, refused, library (it raised itself), undefined (it gave no number), tie,
    skipped, or a failure: differs, raised, state."""

    kind: str
    text: str = ""

    @property
    def failed(self) -> bool:
        return self.kind in ("differs", "raised", "state")


class Unequal(AssertionError):
    """Two sides do not say the same."""


class Undefined(Exception):
    """The library's own answer is no number."""


class Tie(Exception):
    """The two best tokens were as good as equal: either is right."""


def refused(error: BaseException) -> bool:
    """Whether kvlab itself says no: an error of its own, or a plain one raised in its code."""
    if isinstance(error, KvlabError):
        return bool(str(error))
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = HOME in Path(last.filename).parents and (last.line or "").startswith("raise")
    return ours and type(error) in (ValueError, NotImplementedError, TypeError)


def reason(error: BaseException) -> str:
    """The sentence of a refusal with its values cut out."""
    text = " ".join(str(error).split())
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\([^)]*\)", "_", text)
    return re.sub(r"-?\d[\d.,]*", "N", text)[:160]


def told(error: BaseException) -> str:
    """Type, text and place of an error, in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:160]
    place = "/".join(Path(frame.filename).parts[-3:])
    return f"{type(error).__name__}: {text} ({place}:{frame.lineno})"


def close(name: str, want: Tensor, got: Tensor, where: Tensor | None = None, tolerance=TOLERANCE):
    """Raises `Unequal` unless both agree at `where` (bool over the leading dims)."""
    if got is None or want.shape != got.shape:
        raise Unequal(f"{name}: shape {None if got is None else tuple(got.shape)}, "
                      f"the library's is {tuple(want.shape)}")  # fmt: skip
    if where is not None:
        want, got = want[where], got[where]
    if not want.numel():
        return
    if not bool(torch.isfinite(want).all()):
        raise Undefined(name)
    error = (want.detach() - got.detach()).abs()
    allowed = tolerance + 1e-5 * want.detach().abs()
    if not bool((error <= allowed).all()):  # NaN is never <=
        raise Unequal(f"{name}: differs by {float(error.max()):.3g} "
                      f"(values up to {float(want.abs().max()):.3g})")  # fmt: skip


def forwards(want: dict, got: dict, kept: Tensor, valid: Tensor, sound: Tensor) -> None:
    """Compare two forwards; kept: bool [B, T'] of the logits that count, valid: [B, T]."""
    close("logits", want["logits"], got["logits"], kept)
    for i, (a, b) in enumerate(zip(want["hidden"], got["hidden"], strict=True)):
        close(f"hidden state {i}", a, b, valid)
    for i, (a, b) in enumerate(zip(want["attentions"], got["attentions"])):
        if a is not None and b is not None:  # the library's own sdpa shows none either, and says so
            close(f"attentions of layer {i}", a.transpose(1, 2), b.transpose(1, 2), valid)
    if want["loss"] is not None and bool(torch.isfinite(want["loss"])):  # NaN without a label
        close("loss", want["loss"], got["loss"])
    if want["gradient"] is not None:
        size = max(1.0, float(want["gradient"].abs().max()))
        close("gradient", want["gradient"], got["gradient"], sound, TOLERANCE * size)


def generations(want, got, rows: Tensor, prompt: int, beams: bool) -> None:
    """Compare what two `generate()` gave; rows: bool [B] of those with a right answer."""
    a, b = want.sequences, got.sequences
    whole = bool(rows.all())
    if whole and a.shape == b.shape and torch.equal(a, b):
        return
    width = min(a.shape[1], b.shape[1])
    if not whole and torch.equal(a[rows, :width], b[rows, :width]):
        return
    if beams:
        close("scores of beams", want.sequences_scores, got.sequences_scores)
        raise Tie
    _explain(want, a, b, rows, prompt, width)


def _explain(want, a: Tensor, b: Tensor, rows: Tensor, prompt: int, width: int) -> None:
    for row in rows.nonzero()[:, 0].tolist():
        if torch.equal(a[row, :width], b[row, :width]):
            continue
        column = int((a[row, :width] != b[row, :width]).nonzero()[0])
        if 0 <= column - prompt < len(want.scores):
            best = want.scores[column - prompt][row].topk(2).values
            if bool(torch.isfinite(best).all()) and float(best[0] - best[1]) < TIE:
                raise Tie
        ours, theirs = b[row, prompt:].tolist(), a[row, prompt:].tolist()
        raise Unequal(f"tokens of row {row}: {ours}, the library's {theirs}")
    raise Unequal(f"{b.shape[1]} columns of tokens, the library's are {a.shape[1]}")
