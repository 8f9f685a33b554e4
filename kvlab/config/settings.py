"""The keys that belong to no axis: they steer the run itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from kvlab.config.signature import describe, fits, parameters, show
from kvlab.core import BadInput


@dataclass(frozen=True)
class RunSettings:
    """`seed` for every generator; `device`; `resume` a folder; `variants` override strings."""

    seed: int
    device: Literal["auto", "cpu", "cuda"]
    resume: bool
    variants: list[str]

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise BadInput("seed", self.seed, "must lie between 0 and 2**32 - 1")

    @classmethod
    def read(cls, tree: dict) -> RunSettings:
        """From the top level of the configuration. Raises `BadInput` for a wrong type."""
        _, hints = parameters(cls)
        values = {field.name: tree[field.name] for field in fields(cls)}
        for key, value in values.items():
            if not fits(value, hints[key]):
                raise BadInput(key, show(value), f"must be {describe(hints[key])}")
        return cls(**values)
