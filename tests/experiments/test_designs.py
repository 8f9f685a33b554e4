"""Codes rounded with feedback: the same scales, less of the error that is looked at."""

import importlib.util
from pathlib import Path

import pytest
import torch

from kvlab.format.names import key_codec, value_codec

PLACE = Path(__file__).resolve().parents[2] / "experiments/real_formats/designs.py"


@pytest.fixture(scope="module")
def designs():
    spec = importlib.util.spec_from_file_location("format_designs", PLACE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("side, name", [("keys", "int4g"), ("keys", "int2g"), ("values", "int2g")])
def test_feedback_lessens_the_error_that_is_looked_at(designs, side, name):
    torch.manual_seed(0)
    codec = (key_codec if side == "keys" else value_codec)(name)
    x, looks = torch.randn(2, 256, 16), torch.randn(2, 64, 4) @ torch.randn(2, 4, 16)
    moment = looks.mT @ looks + 0.1 * torch.eye(16)

    def seen(read):
        off = read - x
        return torch.einsum("htd,hde,hte->", off, moment, off)

    assert seen(designs.fed_back(codec, x, moment)) < 0.7 * seen(designs.read_back(codec, x))


def test_feedback_that_sees_all_channels_alike_is_plain_rounding(designs):
    torch.manual_seed(0)
    x, codec = torch.randn(2, 128, 16), key_codec("int3g")
    moment = torch.eye(16).expand(2, -1, -1)
    torch.testing.assert_close(designs.fed_back(codec, x, moment), designs.read_back(codec, x))
