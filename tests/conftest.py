"""Every test starts from the same seeds, sees poisoned memory and never asks a network.

Torch is touched only where a test has loaded it: the simulator's tests run without it.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from glob import glob
from importlib import import_module

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: xdist workers share the cores
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
if not glob("/dev/nvidia*"):  # before any test imports a kernel, which binds at import
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from tiny import make_tiny_model  # noqa: E402

_GARBAGE = 77  # an int dtype has no NaN: a value that no test expects


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- what is under test may draw from the global generator
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Memory that nobody wrote is NaN, so that reading it fails a test instead of passing it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(torch, getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch, torch.Tensor.new_empty))


def poisoned(torch, make):
    """`make`, its result filled with NaN, or with garbage where the dtype has none."""

    def filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.device.type == "meta" or type(tensor) is not torch.Tensor:
            return tensor
        with torch.no_grad():
            bad = float("nan") if tensor.dtype.is_floating_point else _GARBAGE
            if not tensor.dtype.is_complex and tensor.numel():
                tensor.view(torch.uint8).fill_(0xFF) if tensor.itemsize == 1 else tensor.fill_(bad)
        return tensor

    return filled


def pytest_collection_finish():
    """What all test modules import stays: collections look at what tests make, or each costs
    seconds beside everything that is loaded (jobs collect before they measure a peak)."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else extensions tell at the end of what they think leaked


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped with a reason where no CUDA device answers; names repeat."""
    moving = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if moving:  # each worker would collect tests of other names, and none would run
        raise pytest.UsageError(f"{moving[0]}: an address in its name, see named.axes_id")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not import_module("torch").cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def tiny_model():
    """`tiny_model(architecture, head_dim=32, **config)`: 2 random layers in fp32, seeded.

    Hidden 64, 4 query heads, 2 key/value heads, vocabulary 128, no end token.
    """
    return make_tiny_model
