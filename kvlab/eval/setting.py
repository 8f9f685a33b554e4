"""What the quality jobs have in common: a model on a device, and who runs beside the variants."""

from __future__ import annotations

from dataclasses import dataclass

from kvlab import axes
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Variant
from kvlab.eval.base import Runner
from kvlab.eval.controls import controls
from kvlab.model.device import prepare_device
from kvlab.model.load import LoadedModel
from kvlab.model.portrait import model_geometry
from kvlab.model.room import adaptive_chunk


@dataclass
class Setting:
    """Arguments that every quality job takes; see `Evaluate` for what they mean."""

    model: object
    chunk_tokens: int | str
    baseline: str
    controls: bool
    device: str
    cap_gb: float | None

    def load(self) -> LoadedModel:
        """The model on its device; an adaptive chunk becomes a number of tokens."""
        device = prepare_device(self.device, self.cap_gb)
        loaded = self.model.load(device)
        if self.chunk_tokens == "adaptive":
            self.chunk_tokens = adaptive_chunk(loaded.model, device)
        return loaded

    def plain(self, loaded: LoadedModel, variants: list[Variant], params: dict) -> list[Runner]:
        """The variants alone; every refusal that needs the model's shape happens here."""
        runs = [
            Runner(v.name, self.params(v.params, loaded, v.spec) | params, v.spec) for v in variants
        ]
        for runner in runs:
            runner.spec.checked_for(model_geometry(loaded.model, runner.spec))
        return runs

    def runners(self, loaded: LoadedModel, variants: list[Variant], params: dict) -> list[Runner]:
        """The full cache first, then the variants and their controls.

        Raises `BadInput` for a model with random weights.
        """
        if loaded.random:
            raise BadInput(
                "model", loaded.name,
                "has random weights, whose quality means nothing; job=cost measures bytes and time",
            )
        for variant in variants:
            if variant.spec.budget_bytes == "adaptive":
                raise BadInput("cache.budget_bytes", "adaptive", "is of no use beside other caches,"
                               " which each would take what is free; give bytes or a percentage")
        extra = controls(variants, self.chunk_tokens) if self.controls else []
        runs = self.plain(loaded, [*variants, *extra], params)
        block = runs[0].spec.block_size if runs else CacheSpec().block_size
        full = CacheSpec(format=self.baseline, block_size=block)
        rest = [r for r in runs if not is_same(r.spec, full)]
        named = next((r.name for r in runs if is_same(r.spec, full)), "full")
        about = self.params({"format": self.baseline}, loaded, full) | params | {"baseline": True}
        return [Runner(named, about, full), *rest]

    def params(self, settings: dict, loaded: LoadedModel, spec: CacheSpec) -> dict:
        own = {"format": spec.format.name, "block_size": spec.block_size}
        return own | settings | loaded.about() | {"chunk_tokens": self.chunk_tokens}


def is_same(spec: CacheSpec, full: CacheSpec) -> bool:
    """Whether a variant is the full cache itself."""
    acting = ("window", "summary", "retrieval", "offload")
    return (
        not spec.bounded and all(axes.is_null(axis, getattr(spec, axis)) for axis in acting)
        and spec.block_size == full.block_size and spec.format.identity == full.format.identity
        and spec.kernels == full.kernels
    )


def noise_floor(full: Runner) -> Runner:
    """The full cache against itself, with chunks of half the size."""
    told = f"{full.name} against itself, chunks of half the size"
    params = full.params | {"baseline": False, "control": told}
    return Runner("noise floor", params, full.spec, pieces=2)
