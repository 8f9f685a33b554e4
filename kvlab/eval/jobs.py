"""Jobs by name: benches of given tasks, with their settings side by side."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.core import Variant
from kvlab.eval.bench import Bench, run_all
from kvlab.eval.cost import TextCost
from kvlab.eval.needle import SecretNumber
from kvlab.eval.recall import Needles
from kvlab.eval.text_loss import BudgetLoss, TextLoss
from kvlab.model import Driver


class Evaluate(Bench):
    """Every variant against the full cache on the same documents: quality, bytes and time.

    documents, tokens, decode_tokens, decode_driver, noise_floor: see `TextLoss`. driver: how
    `decode_tokens_per_second` is measured, see `TextCost`. The rest: see `Bench`.
    """

    loss = TextLoss

    def __init__(
        self, model, data, documents: int | None = 3, tokens: int = 4096,
        decode_tokens: int | None = None, chunk_tokens: int | str = 512, baseline: str = "bf16",
        noise_floor: bool = True, controls: bool = True, progress: bool = True,
        device: str = "auto", cap_gb: float | None = None, seed: int = 0,
        driver: Driver = "auto", decode_driver: Driver = "auto",
    ):
        quality = self.loss(documents, tokens, decode_tokens, decode_driver, noise_floor)
        cost = TextCost(tokens, decode_tokens, driver, account=False)
        super().__init__(model, [quality, cost], data, chunk_tokens, baseline, controls, progress,
                         device, cap_gb, seed)


class Paired(Evaluate):
    """As `Evaluate`; variants of one budget are also paired with each other, see `BudgetLoss`."""

    loss = BudgetLoss


class Cost(Bench):
    """Bytes and time alone; what a model with random weights can be asked for. See `TextCost`."""

    def __init__(
        self, model, data, tokens: int = 4096, decode_tokens: int | None = None,
        chunk_tokens: int | str = 512, progress: bool = True, device: str = "auto",
        cap_gb: float | None = None, driver: Driver = "auto", prefill_driver: Driver = "auto",
    ):
        cost = TextCost(tokens, decode_tokens, driver, prefill_driver=prefill_driver)
        super().__init__(model, cost, data, chunk_tokens, progress=progress, device=device,
                         cap_gb=cap_gb)


class Recall(Bench):
    """Needles at depths x lengths, every variant against the full cache on the same prompts.

    needle to query_aware, decode_driver: see `Needles`. The rest: see `Bench`.
    """

    def __init__(
        self, model, data, needle: SecretNumber, documents: int | None = 3, trials: int = 2,
        lengths: Sequence[int] = (2048, 4096), depths: Sequence[float] = (0, 25, 50, 75, 100),
        needles: int = 1, question_tokens: int = 1, query_aware: bool = False,
        chunk_tokens: int | str = 512, baseline: str = "bf16", controls: bool = True,
        progress: bool = True, device: str = "auto", cap_gb: float | None = None, seed: int = 0,
        decode_driver: Driver = "auto",
    ):
        task = Needles(needle, documents, trials, lengths, depths, needles, question_tokens,
                       query_aware, decode_driver)
        super().__init__(model, task, data, chunk_tokens, baseline, controls, progress, device,
                         cap_gb, seed)


class Study:
    """Quality over all tokens, then recall of needles; one folder, one report.

    quality, recall: the jobs; null leaves one out. Their rows differ in `tokens` and are resumed
    each for itself.
    """

    wants_specs = True

    def __init__(self, quality, recall):
        self.parts = [part for part in (quality, recall) if part is not None]

    def run(self, folder, variants: list[Variant]) -> None:
        """Run what the folder lacks."""
        run_all(self.parts, folder, variants)
