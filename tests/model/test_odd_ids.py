"""Token ids that a model does not have, and masks that do not fit them: one sentence, at once."""

from __future__ import annotations

import pytest
import torch

from kvlab import PagedCache, prefill
from kvlab.core import BadInput
from kvlab.model.decode import generate, sampled

AXES = ({}, {"prefix": "hash"})
IDS = torch.tensor([[5, 6, 7, 8]])
ODD_IDS = {
    "beyond": (IDS + 122, "input_ids=130: is no token of this model, whose ids are 0 to 127"),
    "negative": (-IDS, "input_ids=-8: is no token"),
    "a list": ([[1, 2]], "must be a tensor of token ids"),
    "fractions": (IDS.float(), "torch.float32: must be a tensor of token ids"),
}


@pytest.fixture
def model(tiny_model):
    return tiny_model()


@pytest.mark.parametrize("name", ODD_IDS)
def test_what_are_no_token_ids(model, name):
    """An id beyond the embeddings was an IndexError on a CPU and ends the process on a GPU."""
    ids, told = ODD_IDS[name]
    for axes in AXES:
        cache = PagedCache.for_model(model, **axes)
        with pytest.raises(BadInput, match=told):
            prefill(model, ids, cache)
        assert not cache.rows


@pytest.mark.parametrize("mask", [torch.ones(1, 3), torch.ones(4), [[1, 1, 1, 1]]], ids=range(3))
def test_a_mask_of_another_shape(model, mask):
    with pytest.raises(BadInput, match="attention_mask"):
        prefill(model, IDS, PagedCache.for_model(model), attention_mask=mask)


def test_choices_and_ends(model):
    for given in ({"temperature": float("nan")}, {"temperature": "x"}, {"top_k": 0},
                  {"top_k": 1.5}):  # fmt: skip
        with pytest.raises(BadInput, match=next(iter(given))):
            sampled(**given)
    with pytest.raises(BadInput, match="eos"):
        generate(model, IDS, PagedCache.for_model(model), 2, eos=2**64)
