"""Time to the first token as a function of the tokens to compute: fitted, then predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls


class TtftModel(NamedTuple):
    """ms = per_step * steps + per_token * computed + per_pair * (pairs of a computed and a visible
    token) + per_read * (tokens that steps find in the cache).

    What a simulated hit is worth on this machine: found tokens are not computed, but every step
    reads them, and dequantizes them where the format asks for it. A prompt takes one step for each
    chunk_tokens. Fitted to one request at a time.
    """

    per_step_ms: float
    per_token_ms: float
    per_pair_ms: float
    per_read_ms: float
    chunk_tokens: int

    @classmethod
    def fit(cls, samples: Sequence[tuple[int, int, float]], chunk_tokens: int) -> TtftModel:
        """From (prompt tokens, of them found, ms); non-negative least squares of relative errors,
        so that short prompts count as much as long ones."""
        prompt, found, ms = np.asarray(samples, dtype=float).T
        rows = _terms(prompt, found, chunk_tokens) / ms[:, None]
        scale = np.maximum(rows.max(0), 1e-30)
        found_values, _ = nnls(rows / scale, np.ones(len(ms)))
        return cls(*(found_values / scale).tolist(), chunk_tokens)

    def predict(self, prompt: Sequence[int], found: Sequence[int]) -> np.ndarray:
        """ms for each prompt of which `found` tokens need not be computed."""
        terms = _terms(np.asarray(prompt, dtype=float), np.asarray(found, float), self.chunk_tokens)
        return terms @ self[:-1]


def _terms(prompt: np.ndarray, found: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """[n, 4]: steps, computed tokens, pairs, and tokens that steps read from the cache."""
    computed = prompt - found
    steps = np.ceil(computed / chunk_tokens)
    pairs = computed * (found + computed / 2)
    read = steps * found + chunk_tokens * steps * (steps - 1) / 2
    return np.stack([steps, computed, pairs, read], 1)
