"""The run's device: found, refused, capped."""

from __future__ import annotations

import pytest
import torch

from kvlab.core import BadInput
from kvlab.model.device import prepare_device


def test_auto_is_what_there_is():
    assert prepare_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert prepare_device("cpu").type == "cpu"


def test_cuda_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="device=cuda: no CUDA device answers"):
        prepare_device("cuda")


@pytest.mark.parametrize(("cap", "words"), [(0, "positive"), (-1.0, "positive"), (4.0, "CUDA")])
def test_cap_that_cannot_hold_is_refused(cap, words):
    with pytest.raises(BadInput, match=words):
        prepare_device("cpu", cap)


@pytest.mark.gpu
def test_cap_is_enforced_by_the_allocator():
    device = prepare_device("cuda", 2.0)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(3 * 10**9, dtype=torch.uint8, device=device)
        with pytest.raises(BadInput, match="GB only"):
            prepare_device("cuda", 1e6)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
