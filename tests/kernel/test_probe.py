"""What runs where is found by trying, and lands in a run's environment."""

import pytest
import torch

from kvlab.track import collect_environment

probe = pytest.importorskip("kvlab.kernel.probe_triton")


def test_every_kind_is_tried(device):
    found = probe.support(device)
    assert set(found) == {"fp16", "bf16", "fp8", "int8", "int4", "int3", "int2"}
    if device.type == "cpu":
        assert set(found.values()) == {"interpreted"}
    else:
        modern = torch.cuda.get_device_capability() >= (8, 9)
        assert found["int8"] == "native" and (found["fp8"] == "native") == modern


def test_the_environment_says_what_runs(device):
    formats = collect_environment(device.type)["formats"]
    assert formats["torch"]["bf16"] == "native" and formats["torch"]["fp8"] == "converted"
    assert formats["kernels"] == probe.support(device)


def test_a_refusal_is_a_sentence(monkeypatch, device):
    def refuse(*_):
        raise RuntimeError("first\ntype fp8e4nv not supported in this architecture")

    monkeypatch.setattr(probe, "_run", refuse)
    assert probe._try("fp8", device) == "no: type fp8e4nv not supported in this architecture"


def test_native_is_read_off_the_compiled_code():
    code = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {..}\ncvt.rn.f16x2.e4m3x2 a;"
    assert probe._native("int8", code) and probe._native("fp8", code)
    assert not probe._native("bf16", code) and not probe._native("fp8", "mma.sync.f16;")
