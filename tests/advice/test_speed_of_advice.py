"""Speeds that are told lie between rows that were measured, and near rows that were left out."""

from __future__ import annotations

import hydra
import pytest

from kvlab.advice.choices import spec_of
from kvlab.advice.speed import decoding, prefilling, timed_shapes
from kvlab.advice.table import BLOCK_SIZE, speeds
from kvlab.config import built, conf_dir
from kvlab.core import CacheGeometry
from kvlab.model import outline

H200 = "NVIDIA H200"
ROWS = [s for s in speeds() if s.kind == "decode" and len(s.options) == 1
        and s.report == "decode_speed" and s.options != ("format=k4v2",)]  # fmt: skip
WINDOW = ("format=bf16", "window=sink", "window.middle=false", "window.sinks=64",
          "window.recent=8192")  # fmt: skip


@pytest.fixture(scope="module")
def model():
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return outline(built(["model=qwen3_0_6b_random", "experiment=none"], "model").config())


@pytest.fixture(scope="module")
def g(model):
    return CacheGeometry.of(model.portrait.shapes, model.portrait.query_heads, BLOCK_SIZE)


def told(g, options, tokens, requests=1, table=None):
    return decoding(options, spec_of(options), g, tokens, requests, H200, table)


def test_the_shapes_are_those_that_were_measured(model):
    assert timed_shapes(model)
    assert not timed_shapes(model._replace(parameters=10**9))


@pytest.mark.parametrize("row", ROWS, ids=lambda s: f"{s.options[0]} {s.batch} x {s.tokens}")
def test_each_row_is_told_within_a_tenth(g, row):
    assert told(g, row.options, row.tokens, row.batch).value == pytest.approx(row.value, rel=0.1)


@pytest.mark.parametrize("row", [s for s in ROWS if s.tokens == 32768], ids=str)
def test_a_row_that_was_left_out_is_told_within_a_tenth(g, row):
    others = tuple(s for s in speeds() if s != row)
    near = told(g, row.options, row.tokens, row.batch, others)
    assert row not in near.rows and near.value == pytest.approx(row.value, rel=0.1)


def test_what_was_measured_elsewhere_is_told_within_a_tenth(g):
    """A window and a past on the host, from rows of formats alone and the rate of the bus."""
    rows = [s for s in speeds() if s.report == "memory_200k" and s.kind == "decode"]
    [window] = [s for s in rows if "window=sink" in s.options]
    assert told(g, WINDOW, window.tokens).value == pytest.approx(window.value, rel=0.1)
    host = ("format=fp8", "policy=fifo", "offload=host", "cache.budget_blocks=200")
    [row] = [s for s in rows if s.options == host[:3]]
    assert told(g, host, row.tokens).value == pytest.approx(row.value, rel=0.1)


def test_prefill_lies_between_its_rows_and_a_window_is_faster(g):
    full = {s.tokens: s.value for s in speeds() if s.report == "prefill_speed"
            and s.options == ("format=bf16",)}  # fmt: skip
    near = {n: prefilling(("format=bf16",), spec_of(("format=bf16",)), g, n, H200).value
            for n in (*full, 131072)}  # fmt: skip
    assert all(near[n] == pytest.approx(value, rel=0.1) for n, value in full.items())
    assert near[32768] > near[131072] > near[200000]
    assert prefilling(WINDOW, spec_of(WINDOW), g, 200000, H200).value > 3 * near[200000]


def test_what_no_rows_carry_is_not_told(g):
    assert told(g, ("format=int3",), 8192) is None
    snapkv = ("format=bf16", "policy=snapkv", "cache.budget_percent=25")
    assert prefilling(snapkv, spec_of(snapkv), g, 8192, H200) is None, "scores take time"
    assert decoding(("format=bf16",), spec_of(("format=bf16",)), g, 8192, 1, "A100") is None
