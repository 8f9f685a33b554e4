"""Settings are measured on request, kept by device name, and the roofline's calls run."""

import json

import pytest
import torch

from kvlab.core import BadInput
from kvlab.kernel import tune

pytest.importorskip("triton")
from kvlab.eval import KernelRoofline, Tune, kernels, tuning  # noqa: E402
from kvlab.format import by_name  # noqa: E402
from kvlab.kernel import all_triton  # noqa: E402
from kvlab.kernel.decode_triton import setting_key  # noqa: E402


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLAB_CACHE", str(tmp_path))
    tune.forget()
    yield tmp_path
    tune.forget()


def small(device):
    return kernels.Shape(kv_heads=1, group=2, head_dim=64, device=str(device))


def test_the_fastest_is_kept_for_its_device_alone(device, monkeypatch):
    seen = []

    def clock(call):
        call()
        seen.append(call.keywords["setting"])
        return {(32, 2, 2, 2): 5.0, (32, 1, 2, 1): 7.0, None: 6.0}[seen[-1]]

    times = tuning.measure("int8", 32, small(device), tokens=128, clock=clock,
                           tried=[(32, 1, 2, 1), (32, 2, 2, 2)], device_name="Second GPU")
    assert times[0] == (5.0, (32, 2, 2, 2)) and seen[0] is None
    key = setting_key(by_name("int8"), 32, 64, 2)
    assert tune.choose("Second GPU", key, "int8", 32) == (32, 2, 2, 2)
    standing = tune.choose("Third GPU", key, "int8", 32)
    assert standing == tune.DEFAULTS["int8"][32]
    facts = tune.Device("Second GPU", 2, False)  # a second device needs no change of code
    monkeypatch.setattr(tune, "device_facts", lambda _: facts)
    case = kernels.decode_case(by_name("int8"), small(device), 32, 1, 128)
    out, lse = case.call(all_triton.paged_decode)()
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()


def test_what_is_stored_is_the_fastest_setting_by_device_and_shape_and_later_ones_join_it(
    device, folder
):
    def tuned(format, times, name, **more):
        """Measure settings that take `times`, microseconds by setting; the standing one 9."""
        return tuning.measure(format, 32, small(device), tokens=64, tried=list(times),
                              clock=lambda call: times.get(call.keywords["setting"], 9.0),
                              device_name=name, **more)

    slow, fast = (32, 1, 2, 8), (32, 2, 3, 4)
    times = tuned("int8", {slow: 8.0, fast: 7.0}, "First GPU")
    assert times == [(7.0, fast), (8.0, slow), (9.0, None)]
    int8, int4 = (setting_key(by_name(name), 32, 64, 2) for name in ("int8", "int4"))
    assert int8 != int4
    [file] = [path for path in folder.rglob("*") if path.is_file()]
    assert file == tune.path()
    assert json.loads(file.read_text()) == {"First GPU": {int8: list(fast)}}
    tuned("int4", {slow: 3.0}, "First GPU")
    tuned("int8", {slow: 2.0}, "Second GPU")
    tuned("int8", {slow: 1.0, fast: 2.0}, "Third GPU", store=False)
    tune.forget()  # as another process would, from the file
    assert json.loads(file.read_text()) == {
        "First GPU": {int8: list(fast), int4: list(slow)}, "Second GPU": {int8: list(slow)},
    }  # fmt: skip
    assert tune.choose("First GPU", int8, "int8", 32) == fast
    assert tune.choose("Second GPU", int8, "int8", 32) == slow
    tuned("int8", {slow: 5.0, fast: 6.0}, "First GPU")  # tuned anew: the newer word counts
    assert tune.choose("First GPU", int8, "int8", 32) == slow


def test_the_standing_choice_is_not_stored(device, folder):
    tuning.measure("bf16", 16, small(device), tokens=64, tried=[(32, 1, 2, 1)],
                   clock=lambda call: 1.0 if call.keywords["setting"] is None else 2.0)
    assert not list(folder.iterdir())


def test_candidates_fit_their_blocks():
    for slots in (16, 32, 64, 128, 256):
        tried = tuning.candidates(slots)
        assert 3 < len(tried) < 40 and len(set(tried)) == len(tried)
        assert all(tile <= max(32, slots) for tile, *_ in tried)


@pytest.mark.parametrize("name", ["bf16", "fp8", "int4"])
def test_prefill_by_segments_runs(name, device):
    shape = small(device)
    kernels.prefill_call(all_triton, by_name(name), shape, 32, tokens=8, past=96, segment=64)()


def test_impossible_settings_are_refused():
    with pytest.raises(BadInput, match="segment_tokens"):
        KernelRoofline({"int8": [48]}, [[1, 64]], segment_tokens=64)
    with pytest.raises(BadInput, match="pairs"):
        KernelRoofline({"int8": [32]}, [[1, 0]], segment_tokens=64)
    with pytest.raises(BadInput, match="CUDA"):
        KernelRoofline({"int8": [32]}, [[1, 64]], segment_tokens=64, device="cpu").run(None, [])
    with pytest.raises(BadInput, match="CUDA"):
        Tune(["int8"], [32], device="cpu").run(None, [])
