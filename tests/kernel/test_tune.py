"""Launch settings: defaults, a stored table, and a broken one."""

import pytest
import torch

tune = pytest.importorskip("kvlab.kernel.tune")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLAB_CACHE", str(tmp_path))
    tune.forget()
    yield tmp_path
    tune.forget()


def test_a_stored_setting_wins(folder):
    before = tune.choose("Some GPU", "decode x", "int4", 128)
    tune.store("Some GPU", "decode x", [64, 2, 4, 5])
    assert tune.choose("Some GPU", "decode x", "int4", 128) == (64, 2, 4, 5) != before
    assert tune.choose("Other GPU", "decode x", "int4", 128) == before
    assert (folder / "kernels.json").exists()


def test_a_broken_table_is_no_table(folder):
    (folder / "kernels.json").write_text("{")
    tune.forget()
    assert tune.choose("Some GPU", "decode x", "dense", 16) == tune.DEFAULTS["dense"][256]


def test_every_kind_has_a_setting_for_every_block():
    for kind in ("dense", "fp8", "int8", "int4", "low"):
        for block in (16, 32, 64, 128, 256):
            tile, warps, stages, fill, *_ = tune.choose("Some GPU", "unknown", kind, block)
            assert tile & (tile - 1) == 0 and warps in (1, 2, 4, 8) and stages > 1 and fill > 0


def test_the_cpu_has_facts():
    assert tune.device_facts(torch.device("cpu")) == ("cpu", 2, False)
