"""The evaluation jobs: quality with bytes and time, or bytes and time alone."""

from __future__ import annotations

import numpy as np
import torch

from kvlab import stats
from kvlab.cache import CacheSpec
from kvlab.core import Variant
from kvlab.eval.base import Runner, check_lengths, done
from kvlab.eval.controls import companions
from kvlab.eval.cost import cost
from kvlab.eval.quality import against, decoded, lockstep, memory, quality
from kvlab.eval.setting import Setting, noise_floor
from kvlab.model.decode import Driver, check_driver
from kvlab.model.load import LoadedModel
from kvlab.model.progress import shown


class Evaluate:
    """Every variant against the full cache on the same documents: quality, bytes and time.

    model, data: a loader and a source of documents.
    documents, tokens: how many documents (null: all that are long enough), tokens of each.
    decode_tokens: of them, the last ones are computed one at a time, through the decode path.
    chunk_tokens: tokens of a prefill chunk, or `adaptive`: as many as the memory that is free at
        the start carries; with a lossy format part of the method.
    progress: a bar on a terminal, a line now and then in a log.
    driver: how `decode_tokens_per_second` is measured, see `model.decode.Decoder`; quality always
        goes through the eager forward.
    baseline: format of the full cache that everything is compared with.
    noise_floor: also measure the full cache against itself with chunks of half the size.
    controls: add the negative controls of every variant that evicts, see `kvlab.eval.controls`.
    device, cap_gb, seed: see `prepare_device`; the seed is the bootstrap's.
    """

    wants_specs = True
    measures_quality = True

    def __init__(
        self, model, data, documents: int | None = 3, tokens: int = 4096,
        decode_tokens: int = 32, chunk_tokens: int | str = 512, baseline: str = "bf16",
        noise_floor: bool = True, controls: bool = True, progress: bool = True,
        device: str = "auto", cap_gb: float | None = None, seed: int = 0,
        driver: Driver = "auto",
    ):
        check_lengths(tokens, decode_tokens, chunk_tokens)
        check_driver(driver)
        self.data, self.documents, self.tokens = data, documents, tokens
        self.decode_tokens, self.chunk_tokens = decode_tokens, chunk_tokens
        self.baseline, self.noise_floor = baseline, noise_floor
        self.progress, self.driver, self.seed = progress, driver, seed
        self.setting = Setting(model, chunk_tokens, baseline, controls, device, cap_gb)

    def run(self, folder, variants: list[Variant]) -> None:
        """Measure all variants that `folder` does not hold yet."""
        loaded = self.setting.load()
        device, self.chunk_tokens = loaded.model.device, self.setting.chunk_tokens
        check_driver(self.driver, device)
        runners = self._runners(loaded, variants)
        scored = [r for r in runners if self.measures_quality and not done(folder, r, "perplexity")]
        timed = [
            r for r in runners
            if not r.params.get("control") and not done(folder, r, "prefill_seconds")
        ]
        if not scored and not timed:
            return
        documents = self.data.documents(loaded.tokenizer, self.documents, self.tokens)
        texts = [torch.from_numpy(np.asarray(d.ids)).long().to(device) for d in documents]
        if scored:
            self._quality(folder, loaded, texts, scored)
        self._cost(folder, loaded, texts[0], timed)

    def _runners(self, loaded: LoadedModel, variants: list[Variant]) -> list[Runner]:
        """Baseline first; every refusal happens here, before anything is written."""
        params = {"tokens": self.tokens, "decode_tokens": self.decode_tokens}
        if not self.measures_quality:
            return self.setting.plain(loaded, variants, params)
        full, *rest = self.setting.runners(loaded, variants, params)
        return [full, *([noise_floor(full)] if self.noise_floor else []), *rest]

    def _quality(self, folder, loaded, texts, todo: list[Runner]) -> None:
        baseline, others = todo[0], todo[1:]
        if not baseline.params.get("baseline"):  # resumed: its rows are there, its run is needed
            full = CacheSpec(format=self.baseline, block_size=todo[0].spec.block_size)
            baseline, others = Runner("full", {}, full), todo
        for step, ids in enumerate(texts):
            with shown(self.progress, len(ids), f"document {step + 1} of {len(texts)}") as show:
                lockstep(
                    loaded, ids, baseline, others, self.chunk_tokens, self.decode_tokens, show
                )
            folder.history(step, {
                f"{r.name}/nll_mean": float(r.nll[-1].mean()) for r in (baseline, *others)
            })
        compared = list(companions(todo, self.chunk_tokens))
        for runner in todo:
            rows = [*quality(runner, baseline, self.seed), *memory(runner)]
            rows += decoded(runner, baseline, self.seed)
            rows += [against(*c, self.seed) for c in compared if c[0] is runner]
            folder.add(runner.name, runner.params, rows)
            if runner is not baseline:
                curve = stats.position_intervals(runner.nll, baseline.nll)
                folder.curve("per_position", runner.name, **curve)

    def _cost(self, folder, loaded, ids, todo: list[Runner]) -> None:
        for runner in todo:
            alone = Runner(runner.name, runner.params, runner.spec)
            rows = list(cost(loaded, ids, alone, self.chunk_tokens, self.decode_tokens,
                             self.driver))
            held = [] if self.measures_quality else list(memory(alone))
            folder.add(runner.name, runner.params, [*rows, *held])


class Cost(Evaluate):
    """Bytes and time alone; what a model with random weights can be asked for."""

    measures_quality = False
