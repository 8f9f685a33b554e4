"""Data, a format, a policy and a task as a user writes them: one file in the folder of the run."""

from __future__ import annotations

import numpy as np
import torch

from kvlab.eval import Forced, Item, Question
from kvlab.eval.data import Document
from kvlab.format import Codec, Dense, KVFormat, Plane
from kvlab.policy import PriorityPolicy


class Counting:
    """Documents that count up, each from another number; no tokenizer is asked."""

    key = "data"

    def documents(self, tokenizer, count: int, tokens: int) -> list[Document]:
        return [Document(f"from {n}", (n + np.arange(tokens)).astype(np.int32) % 128)
                for n in range(count)]  # fmt: skip


class Signs(Codec):
    """One byte of sign for each element, and the mean size of a token's."""

    bits = 8

    def planes(self, slots: int, heads: int, dim: int) -> dict[str, Plane]:
        return {"sign": Plane((heads, slots, dim), torch.int8),
                "size": Plane((heads, slots, 1), torch.float16)}

    def quantize(self, x):
        x = x.transpose(1, 2).float()
        size = x.abs().mean(-1, keepdim=True)
        return {"sign": x.sign().to(torch.int8), "size": size.to(torch.float16)}

    def dequantize(self, planes, dtype):
        return (planes["sign"].to(dtype) * planes["size"].to(dtype)).transpose(1, 2)

    def __repr__(self) -> str:
        return "signs"


class SignedValues(KVFormat):
    """Keys as they are, of values only the signs."""

    def __init__(self):
        super().__init__(Dense("bfloat16"), Signs(), "signed_values")


class Oldest(PriorityPolicy):
    """The block that came first leaves first."""

    name = "oldest"

    def priority(self, meta):
        return (meta.born,)


class Next(Forced):
    """The tokens that follow a document that counts up."""

    name = "next"

    def __init__(self, tokens: int = 96, samples: int = 2):
        super().__init__(question_tokens=8)
        self.tokens, self.samples = tokens, samples

    def items(self, model, data, seed):
        for document in data.documents(None, self.samples, self.tokens + 4):
            ids = np.array(document.ids)
            yield Item(document.id, ids[:-4], (Question(ids[-4:-2], answer=ids[-2:]),))
