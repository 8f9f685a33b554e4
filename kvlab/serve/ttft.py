"""Time to the first token as a function of the tokens to compute: fitted, then predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls


class TtftModel(NamedTuple):
    """ms = base + per_token * computed + per_pair * (pairs of a computed and a visible token)
    + per_found * found.

    What a simulated hit is worth on this machine: found tokens are not computed, but read, and
    dequantized where the format asks for it. Fitted to one request at a time.
    """

    base_ms: float
    per_token_ms: float
    per_pair_ms: float
    per_found_ms: float

    @classmethod
    def fit(cls, samples: Sequence[tuple[int, int, float]]) -> TtftModel:
        """From (prompt tokens, of them found, ms); non-negative least squares of relative errors,
        so that short prompts count as much as long ones."""
        prompt, found, ms = np.asarray(samples, dtype=float).T
        rows = _terms(prompt, found) / ms[:, None]
        scale = np.maximum(rows.max(0), 1e-30)
        found_values, _ = nnls(rows / scale, np.ones(len(ms)))
        return cls(*(found_values / scale).tolist())

    def predict(self, prompt: Sequence[int], found: Sequence[int]) -> np.ndarray:
        """ms for each prompt of which `found` tokens need not be computed."""
        return _terms(np.asarray(prompt, dtype=float), np.asarray(found, dtype=float)) @ self


def _terms(prompt: np.ndarray, found: np.ndarray) -> np.ndarray:
    """[n, 4]: one, computed tokens, pairs, found tokens."""
    computed = prompt - found
    pairs = computed * (found + computed / 2)
    return np.stack([np.ones_like(prompt), computed, pairs, found], 1)
