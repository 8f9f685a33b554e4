"""A model and documents so small that a whole evaluation takes a second, for tests of runs."""

from __future__ import annotations

import numpy as np
from tiny import make_tiny_model

from kvlab.eval.data import Document
from kvlab.model.load import LoadedModel


class Tiny:
    """Two random layers that claim to be a trained model: what is tested is the run around it."""

    def __init__(self, dtype: str = "auto"):
        self.dtype = dtype

    def load(self, device) -> LoadedModel:
        return LoadedModel(make_tiny_model().to(device), None, "tiny", False, "tiny", "made")


class Noise:
    """Documents of random tokens."""

    key = "data"

    def documents(self, tokenizer, count: int, tokens: int) -> list[Document]:
        draw = np.random.default_rng(7)
        return [Document(str(n), draw.integers(1, 128, tokens).astype(np.int32))
                for n in range(count)]  # fmt: skip
