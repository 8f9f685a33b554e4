"""Whether Triton interprets kernels on the CPU, and what that needs.

Set TRITON_INTERPRET=1 before the first import of a `*_triton` module.
"""

from __future__ import annotations

import triton
from triton.runtime import interpreter

ACTIVE = bool(triton.knobs.runtime.interpret)

if ACTIVE:  # Triton before 3.7: numpy 2.4 no longer turns a one-element array into an int
    _original = interpreter._patch_lang_tensor

    def _patch(tensor, *scope):
        _original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = _patch
