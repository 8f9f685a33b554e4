"""What is kept of an error: text alone, for the error itself holds every tensor on its way."""

from __future__ import annotations

import traceback
from typing import NamedTuple

_LONGEST = 400  # characters of a message


class Failure(NamedTuple):
    """reason: one line; trace: where in the code, for `failures.log`."""

    reason: str
    trace: str = ""

    @classmethod
    def of(cls, error: Exception, where: str = "") -> Failure:
        """`where`: on what, such as `document 2 of 3`."""
        text = " ".join(str(error).split())[:_LONGEST]
        told = f"{type(error).__name__}: {text}" if text else type(error).__name__
        trace = "".join(traceback.format_exception(error))
        return cls(f"{told} ({where})" if where else told, trace)
