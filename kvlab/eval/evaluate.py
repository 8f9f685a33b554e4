"""The evaluation jobs: quality with bytes and time, or bytes and time alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from kvlab import stats
from kvlab.core import Measurement, Variant
from kvlab.eval.base import Runner, alive, awaited_last, check_lengths, done, failing
from kvlab.eval.controls import companions
from kvlab.eval.cost import cost
from kvlab.eval.quality import against, decoded, lockstep, memory, per_document, quality
from kvlab.eval.scores import Scores
from kvlab.eval.setting import Setting, noise_floor
from kvlab.model.decode import Driver, check_driver
from kvlab.model.load import LoadedModel
from kvlab.model.progress import shown

AWAITED = "perplexity"  # what a variant has that is through all documents


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
        scored = self.measures_quality and not all(done(folder, r, AWAITED) for r in runners)
        timed = [
            r for r in runners
            if not r.params.get("control") and not done(folder, r, "prefill_seconds")
        ]
        if not scored and not timed:
            return
        documents = self.data.documents(loaded.tokenizer, self.documents, self.tokens)
        texts = [torch.from_numpy(np.asarray(d.ids)).long().to(device) for d in documents]
        if scored:
            self._quality(folder, loaded, texts, runners)
        self._cost(folder, loaded, texts[0], alive(timed))

    def _runners(self, loaded: LoadedModel, variants: list[Variant]) -> list[Runner]:
        """Baseline first; every refusal happens here, before anything is written."""
        params = {"tokens": self.tokens, "decode_tokens": self.decode_tokens}
        if not self.measures_quality:
            return self.setting.plain(loaded, variants, params)
        full, *rest = self.setting.runners(loaded, variants, params)
        return [full, *([noise_floor(full)] if self.noise_floor else []), *rest]

    def _quality(self, folder, loaded, texts, runners: list[Runner]) -> None:
        """Documents that are on disk are taken from there; the full cache, `runners[0]`, runs
        again where a variant misses one."""
        scores, known = Scores(folder), [t.numpy(force=True) for t in texts]
        baseline, *others = runners
        others = [r for r in others if not done(folder, r, AWAITED) or scores.holds(r, known)]
        for number, ids in enumerate(texts):
            self._document(folder, loaded, scores, (number, len(texts)), ids, baseline, others)
            folder.history(number, {
                f"{r.name}/nll_mean": float(r.nll[-1].mean()) for r in alive([baseline, *others])
            })
        self._write(folder, alive([baseline, *others]))

    def _document(self, folder, loaded, scores: Scores, place, ids, baseline, others) -> None:
        number, count = place
        before, known = alive(others), ids.numpy(force=True)
        todo = [r for r in before if not scores.take(r, number, known, r.columns)]
        measured = [baseline, *todo]
        if not todo and scores.take(baseline, number, known, baseline.columns):
            measured = []
        name = f"document {number + 1} of {count}"
        if measured:
            with failing(folder, AWAITED, baseline, *todo), shown(
                self.progress, len(ids), name
            ) as show:
                lockstep(loaded, ids, baseline, todo, self.chunk_tokens, self.decode_tokens, show,
                         name)
        for runner in alive(measured):
            scores.keep(runner, number, known, runner.columns)
        for runner in alive([baseline, *before]):
            folder.add(runner.name, runner.params, per_document(runner), step=number + 1)

    def _write(self, folder, whole: list[Runner]) -> None:
        """Rows over all documents. What is paired with another comes first where a runner is done:
        the other one may have failed in the run before."""
        baseline = whole[0]
        for runner in whole:
            if done(folder, runner, AWAITED):
                folder.add(runner.name, runner.params, self._beside(folder, runner, whole))
        for runner in whole:
            if done(folder, runner, AWAITED):
                continue
            rows = [*memory(runner), *decoded(runner, baseline, self.seed),
                    *self._beside(folder, runner, whole), *quality(runner, baseline, self.seed)]
            if runner is not baseline:
                curve = stats.position_intervals(runner.nll, baseline.nll)
                folder.curve("per_position", runner.name, **curve)
            folder.add(runner.name, runner.params, awaited_last(rows, AWAITED))

    def _beside(self, folder, runner: Runner, whole: list[Runner]) -> Iterator[Measurement]:
        """Rows that pair a runner with others than the full cache."""
        for one, kind, control in companions(whole, self.chunk_tokens):
            if one is runner and not done(folder, runner, f"kl_minus_{kind}_nats"):
                yield against(runner, kind, control, self.seed)

    def _cost(self, folder, loaded, ids, todo: list[Runner]) -> None:
        for runner in todo:
            alone = Runner(runner.name, runner.params, runner.spec)
            with folder.surviving(runner.name, runner.params, "prefill_seconds"):
                rows = list(cost(loaded, ids, alone, self.chunk_tokens, self.decode_tokens,
                                 self.driver))
                held = [] if self.measures_quality else list(memory(alone))
                folder.add(runner.name, runner.params,
                           awaited_last([*rows, *held], "prefill_seconds"))


class Cost(Evaluate):
    """Bytes and time alone; what a model with random weights can be asked for."""

    measures_quality = False
