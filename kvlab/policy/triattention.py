"""TriAttention: what queries will look at, from where they point on the whole."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path

from kvlab.core import BadInput
from kvlab.policy.scored import ScoredTokens

PARTS = ("real", "imaginary", "norm")


class TriAttention(ScoredTokens):
    """The token that queries to come look at least leaves, by the centres of a model's queries.

    TriAttention (Mao et al. 2026, https://arxiv.org/abs/2604.04921), for long reasoning, see
    `kvlab.cache.trigonometric.TriAttention`. centres: measured of the model, a JSON file that
    `python -m kvlab.model.centres MODEL TEXT FILE` writes, or what is in it. reach: tokens ahead
    that are looked at, in powers of two.
    Differs: tokens leave when a sequence exceeds its share by an eighth, where the paper has every
    128 decoded tokens; a prompt's tokens compete with the others. Each head of each layer chooses
    (`cache.groups=all`: one choice, by the mean of the heads where the authors' has the most).
    """

    name = "triattention"
    by_token: object = "triattention"

    def __init__(self, centres: str | dict | None = None, reach: int = 65536):
        super().__init__()
        if isinstance(reach, bool) or reach < 1:
            raise BadInput("policy.reach", reach, "must be at least 1 token")
        told = centres
        if isinstance(centres, str):
            centres = _read(centres)
        shapes = {_shape(centres.get(n)) for n in PARTS} if isinstance(centres, dict) else {None}
        if None in shapes or len(shapes) > 1:
            remedy = "python -m kvlab.model.centres MODEL TEXT FILE"
            raise BadInput("policy.centres", _short(told), "must be what queries of this model "
                           f"point at, or a JSON file of it: {remedy}")
        self.centres, self.reach = centres, reach
        self.by_token = "triattention", {"centres": centres, "reach": reach}


def _shape(numbers: object) -> tuple[int, ...] | None:
    """By layer, query head and pair of dims; None where these are no such finite numbers."""
    if isinstance(numbers, (int, float)):
        return () if isfinite(numbers) else None
    if not isinstance(numbers, (list, tuple)):
        return None
    within = {_shape(x) for x in numbers}
    inner = within.pop() if len(within) == 1 else None
    return None if inner is None or len(inner) > 2 else (len(numbers), *inner)


def _short(told: object) -> str:
    text = str(told)
    return text if len(text) <= 60 else text[:60] + "..."


def _read(path: str) -> object:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput("policy.centres", path, f"cannot be read: {error}") from error
