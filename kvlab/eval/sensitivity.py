"""What rounding each layer's keys and values costs, and the formats by layer that follow from it.

KVTuner (https://arxiv.org/abs/2502.04420) searches precision pairs of layers; here the loss is the
KL divergence of the model's own predictions, one layer's keys or values stored at a time, and the
search is exact for losses that add up. What it finds is measured as a whole, on other documents,
beside the uniform formats of the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from kvlab import stats
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, CacheGeometry, Measurement, Variant
from kvlab.eval.allotment import Choice, allot
from kvlab.eval.bench import Bench, measure_all
from kvlab.eval.round import Round
from kvlab.eval.rows import interval, size
from kvlab.eval.runner import Runner
from kvlab.eval.task import Item
from kvlab.eval.text_loss import TextLoss
from kvlab.format import ByLayer, KVFormat, by_name, paired
from kvlab.model import LoadedModel, model_geometry

SIDES = ("keys", "values")
LOSS = "layer_kl_nats"
PREDICTED = "kl_added_up_nats"


class LayerLoss(TextLoss):
    """KL of a cache in which one layer's keys, or its values, are stored in few bits."""

    name = "layer_loss"
    awaited = LOSS
    history = ()
    accounts = False

    def __init__(self, documents: int, tokens: int):
        super().__init__(documents, tokens, decode_tokens=0, noise_floor=False)

    def item_rows(self, mine: Runner, number: int) -> Iterator[Measurement]:
        return iter(())

    def rows(self, mine: Runner, full: Runner, seed: int) -> Iterator[Measurement]:
        kl = mine.column("kl")
        found = stats.mean_interval(kl, seed=seed) if kl else stats.Interval(0.0, 0.0, 0.0)
        yield interval(LOSS, found, "nats", "lower", size(mine.column("nll")))

    def details(self, folder, mine: Runner, full: Runner, items, seed: int) -> None:
        """No curve by position: there would be one for each of them."""


class OtherText(TextLoss):
    """`TextLoss` on the documents behind the first `skip`."""

    def __init__(self, skip: int, documents: int, tokens: int):
        super().__init__(skip + documents, tokens, decode_tokens=0)
        self.skip = skip

    def items(self, model, data, seed: int) -> list[Item]:
        return super().items(model, data, seed)[self.skip :]


class Case(NamedTuple):
    """One layer's keys or values stored by a codec."""

    layer: int
    side: str
    codec: str

    def variant(self, layers: int, dense: str, block_size: int, sinks: int) -> Variant:
        pair = (self.codec, dense) if self.side == "keys" else (dense, self.codec)
        formats = [by_name(dense)] * layers
        formats[self.layer] = paired("/".join(pair), sinks)
        spec = CacheSpec(format=ByLayer(formats), block_size=block_size)
        return Variant(f"layer {self.layer} {self.side} {self.codec}", self._asdict(), spec)


class Sensitivity(Bench):
    """Measures every case, then searches formats by layer that hold no more bytes than given ones.

    keys, values: codecs to choose among for each layer (`kvlab.format.CODECS`).
    like: uniform formats whose bytes are the budgets, and which the finds are measured beside.
    bits: further budgets, in bits an element of sealed blocks, scales included.
    sinks: first tokens kept as computed, in all of it. block_size: tokens of a block.
    documents, check_documents: those that the search learns from, and others that it is judged on.
    tokens: of each. batch: caches measured beside one run of the full cache.
    The rest: see `Bench`. The full cache is in the model's own dtype.
    """

    wants_specs = False

    def __init__(
        self, model, data, keys: Sequence[str] = ("int4g", "int3g", "int2g"),
        values: Sequence[str] = ("int4g", "int3g", "int2g"),
        like: Sequence[str] = ("int4g", "int3g", "k4v2g", "k3v2g", "int2g"),
        bits: Sequence[float] = (), sinks: int = 4, block_size: int = 128, documents: int = 3,
        check_documents: int = 3, tokens: int = 2048, chunk_tokens: int | str = 512,
        batch: int = 24, progress: bool = True, device: str = "auto",
        cap_gb: float | None = None, seed: int = 0,
    ):
        tasks = [LayerLoss(documents, tokens), OtherText(documents, check_documents, tokens)]
        super().__init__(model, tasks, data, chunk_tokens, "bf16", False, progress, device, cap_gb,
                         seed)
        if not keys or not values or batch < 1:
            raise BadInput("keys, values, batch", (list(keys), list(values), batch),
                           "name a codec for each, and a batch of at least 1")
        if not like and not bits:
            raise BadInput("like", [], "is no budget: name formats, or give bits")
        self.choices = dict(zip(SIDES, (list(keys), list(values))))
        self.like, self.bits, self.sinks = list(like), list(bits), sinks
        self.block_size, self.batch = block_size, batch

    def run(self, folder, variants: list[Variant]) -> None:
        if variants:
            raise BadInput("variants", [v.name for v in variants], "the search makes its own; keys "
                           "and values say from what")
        loaded = self.setting.load()
        dense = str(loaded.model.dtype).removeprefix("torch.")
        self.setting.baseline = {"float32": "fp32", "float16": "fp16"}.get(dense, "bf16")
        spec = CacheSpec(block_size=self.block_size)
        g = model_geometry(loaded.model, spec)
        rivals = [self._whole(by_name(name, sinks=self.sinks), name) for name in self.like]
        cases = [Case(layer, side, codec) for layer in range(g.layers)
                 for side, codecs in self.choices.items() for codec in codecs]  # fmt: skip
        self._measure(folder, loaded, cases, g)
        found = self._search(losses(folder.rows()), g, rivals)
        self._check(folder, loaded, found, rivals)

    def _whole(self, format: KVFormat, name: str, params: dict | None = None) -> Variant:
        spec = CacheSpec(format=format, block_size=self.block_size)
        return Variant(name, params or {"format": name, "format.sinks": format.sinks}, spec)

    def _measure(self, folder, loaded: LoadedModel, cases: list[Case], g: CacheGeometry) -> None:
        """Each case in step with the full cache, some at a time: a cache for each is held."""
        task = self.tasks[0]
        made = [case.variant(g.layers, self.setting.baseline, self.block_size, self.sinks)
                for case in cases]  # fmt: skip
        full, *runners = self.setting.runners(loaded, made, task.params())
        items = list(task.items(loaded, self.data, self.seed))
        starts = range(0, len(runners), self.batch)
        parts = [runners[first : first + self.batch] for first in starts]
        rounds = [Round(folder, task, [full, *part], items, self.seed) for part in parts]
        measure_all(rounds, self.progress)

    def _search(
        self, kl: dict[Case, float], g: CacheGeometry, rivals: list[Variant]
    ) -> list[tuple[Variant, float]]:
        """A variant for each budget, and what its losses add up to."""
        budgets = {v.name: v.spec.format.block_bytes(g) for v in rivals}
        for bits in self.bits:
            budgets[f"{bits:g} bits"] = int(bits * g.elements_per_block / 8)
        found = []
        for told, nbytes in budgets.items():
            places, items = table(kl, self.choices, g)
            chosen = allot(items, nbytes)
            if chosen is None:
                print(f"{told}: no choice of keys and values is as small", flush=True)
                continue
            names = [self.choices[side][n] for (_, side), n in zip(places, chosen)]
            layers = runs(f"{k}/{v}" for k, v in zip(names[::2], names[1::2]))
            params = {"format": "by_layer", "format.layers": layers, "format.sinks": self.sinks}
            variant = self._whole(ByLayer(layers, self.sinks), f"by layer as {told}", params)
            found.append((variant, sum(item[n].loss for item, n in zip(items, chosen))))
        return found

    def _check(
        self, folder, loaded: LoadedModel, found: list[tuple[Variant, float]],
        rivals: list[Variant],
    ) -> None:
        """Measure what was found on other documents, beside uniform formats of the same bytes."""
        task = self.tasks[1]
        whole = [*rivals, *(variant for variant, _ in found)]
        runners = self.setting.runners(loaded, whole, task.params())
        runners = [runners[0], *task.beside(runners[0]), *runners[1:]]
        measure_all([self.round(folder, task, runners, loaded)], self.progress)
        measured = {row["variant"]: row["value"] for row in folder.rows()
                    if row["name"] == "kl_mean_nats"}  # fmt: skip
        for runner in runners:
            for variant, added in found:
                if runner.name == variant.name and not folder.done(
                        runner.name, runner.params, [PREDICTED]):  # fmt: skip
                    row = Measurement(PREDICTED, added, "nats", None)
                    folder.add(runner.name, runner.params, [row])
        for variant, added in found:
            line = ",".join(variant.params["format.layers"])
            print(f"{variant.name}: KL {measured.get(variant.name, float('nan')):.4f} (added up "
                  f"{added:.4f}){_beside(variant, measured)}\n  format=by_layer "
                  f"'format.layers=[{line}]' format.sinks={self.sinks}", flush=True)


def _beside(variant: Variant, measured: dict[str, float]) -> str:
    name = variant.name.removeprefix("by layer as ")
    return f", {name} {measured[name]:.4f}" if name in measured else ""


def losses(rows: list[dict]) -> dict[Case, float]:
    """KL of each case that was measured, from a run's rows; never below 0."""
    return {
        Case(*(row["params"][key] for key in Case._fields)): max(0.0, row["value"])
        for row in rows if row["name"] == LOSS and Case._fields[0] in row["params"]
    }


def table(
    kl: dict[Case, float], choices: dict[str, list[str]], g: CacheGeometry
) -> tuple[list[tuple[int, str]], list[list[Choice]]]:
    """(layer, side) of each item, and its choices. Raises `BadInput` where one was not measured."""
    places = [(layer, side) for layer in range(g.layers) for side in SIDES]
    missing = [case for layer, side in places for codec in choices[side]
               if (case := Case(layer, side, codec)) not in kl]  # fmt: skip
    if missing:
        raise BadInput("job", "sensitivity", f"{len(missing)} cases failed, the first is layer "
                       f"{missing[0].layer} {missing[0].side} {missing[0].codec}: nothing can be "
                       "searched without them")
    items = [[Choice(kl[Case(layer, side, codec)], side_bytes(codec, side, g, layer))
              for codec in choices[side]] for layer, side in places]  # fmt: skip
    return places, items


def side_bytes(codec: str, side: str, g: CacheGeometry, layer: int) -> int:
    """Bytes of a block of a layer's keys or values, scales included."""
    format, shape = paired(f"{codec}/{codec}"), g.shapes[layer]
    planes = format.planes_of(shape, g.block_size)
    return sum(p.nbytes for name, p in planes.items() if name[0] == side[0])


def runs(names: Iterator[str]) -> list[str]:
    """Equal neighbours as one entry of `ByLayer`: a, a, b -> a*2, b."""
    found = [(name, len(list(same))) for name, same in groupby(names)]
    return [name if count == 1 else f"{name}*{count}" for name, count in found]
