"""Kernels run on the GPU where there is one, else through Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel module is imported
else:
    os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory holds NaN, so that an element nobody writes is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(x):
        return x.fill_(float("nan")) if x.is_floating_point() and x.itemsize > 1 else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: filled(empty_like(*a, **k)))
    torch.manual_seed(1234)
