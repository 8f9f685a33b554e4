"""Inline assembly that makes operands of packed codes, against what it stands for."""

import random

import numpy as np
import pytest
from ptx import run

codes = pytest.importorskip("kvlab.kernel.codes_triton")
seal_groups = pytest.importorskip("kvlab.kernel.seal_groups_triton")
subnormal = pytest.importorskip("kvlab.kernel.subnormal_triton")


def halves(words: list[int]) -> list[float]:
    return np.array(words, np.uint32).view(np.float16).astype(float).tolist()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_codes_become_subnormal_halves_in_their_places(bits):
    per, step = (2, 4) if bits == 4 else (4, 2)
    for _ in range(50):
        code = [[random.randrange(2**bits) for _ in range(per)] for _ in range(4)]
        low = [sum((c & (2**step - 1)) << step * p for p, c in enumerate(cs)) for cs in code]
        high = [sum((c >> 2) << 2 * p for p, c in enumerate(cs)) for cs in code]
        words = [sum(b << 8 * i for i, b in enumerate(x)) for x in (low, high)]
        out = run(subnormal.masks_asm(bits), words[: 1 + (bits == 3)], 2 * per)
        for p in range(per):
            got = halves(out[2 * p : 2 * p + 2])
            assert got == [cs[p] * 2.0 ** (step * p - 24) for cs in code]
            assert subnormal.place_of(p, per, bits) == 2.0 ** (step * p)


def test_third_bits_of_both_halves():
    for _ in range(50):
        lower, upper = random.getrandbits(32), random.getrandbits(32)
        (got,) = run(codes.third_asm(), [lower, upper], 1)
        assert got == (lower | upper >> 1) & 0x55555555


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_error_of_the_nearest_code(bits):
    top = 2**bits - 1
    for _ in range(200):
        x, per, shift, error = (random.uniform(-9, 9) for _ in range(4))
        (got,) = run(seal_groups.off_asm(top), [x, per, shift, per / top, shift / top, error], 1)
        u = x * per + shift
        assert got == pytest.approx(error + (min(max(round(u), 0), top) - u) ** 2, abs=1e-3)
