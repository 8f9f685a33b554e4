"""A model on a device, and who runs on it: the variants, the full cache, their controls."""

from __future__ import annotations

from dataclasses import dataclass

from kvlab import axes
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Variant
from kvlab.eval.controls import controls
from kvlab.eval.runner import Runner
from kvlab.model import LoadedModel, model_geometry, prepare_device
from kvlab.model.room import adaptive_chunk


@dataclass
class Setting:
    """Arguments of every bench; see `Bench` for what they mean. Raises `BadInput` for a chunk of
    no tokens."""

    model: object
    chunk_tokens: int | str
    baseline: str
    controls: bool
    device: str
    cap_gb: float | None

    def __post_init__(self):
        size = self.chunk_tokens
        if size != "adaptive" and (isinstance(size, str) or size < 1):
            raise BadInput("chunk_tokens", size, "must be at least 1, or adaptive")

    def load(self) -> LoadedModel:
        """The model on its device; an adaptive chunk becomes a number of tokens."""
        device = prepare_device(self.device, self.cap_gb)
        loaded = self.model.load(device)
        if self.chunk_tokens == "adaptive":
            self.chunk_tokens = adaptive_chunk(loaded.model, device)
        return loaded

    def plain(self, loaded: LoadedModel, variants: list[Variant], params: dict) -> list[Runner]:
        """The variants alone; every refusal that needs the model's shape happens here."""
        for variant in variants:
            variant.spec.checked_for(model_geometry(loaded.model, variant.spec))
        return [self.runner(loaded, v.name, v.params, v.spec, params) for v in variants]

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
        spec = CacheSpec(format=self.baseline, block_size=block)
        same = [r.name for r in runs if is_same(r.spec, spec)]
        full = self.runner(loaded, *same[:1] or ["full"], {"format": self.baseline}, spec, params)
        full.params["baseline"] = True
        return [full, *(r for r in runs if not is_same(r.spec, spec))]

    def runner(
        self, loaded: LoadedModel, name: str, settings: dict, spec: CacheSpec, params: dict
    ) -> Runner:
        """settings: of the variant; params: of the task."""
        own = {"format": spec.format.name, "block_size": spec.block_size}
        about = own | settings | loaded.about(spec) | {"chunk_tokens": self.chunk_tokens} | params
        return Runner(name, about, spec, loaded=loaded, chunk_tokens=self.chunk_tokens)


def is_same(spec: CacheSpec, full: CacheSpec) -> bool:
    """Whether a variant is the full cache itself. One that shares prefixes holds the same, but
    takes other time."""
    return (
        not spec.bounded and all(axes.is_null(axis, getattr(spec, axis)) for axis in axes.alike())
        and spec.block_size == full.block_size and spec.format.identity == full.format.identity
        and spec.kernels == full.kernels and not spec.prefix.shares
    )
