"""Task: the loss of plain text, token by token, and how far predictions are from the full cache's.

The full cache and every variant see the same tokens in the same windows, so that differences are
paired and no logits have to be stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import numpy as np

from kvlab import stats
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Measurement
from kvlab.eval.divergence import compare, nll
from kvlab.eval.rows import interval, size
from kvlab.eval.runner import Runner
from kvlab.eval.task import Item, StepTask
from kvlab.model import Driver, check_driver

DECODED_BLOCK = 32  # tokens resampled together
DECODED_STEP = 32  # tokens decoded, one at a time, before the next cache has its turn


class TextLoss(StepTask):
    """Perplexity, KL and top-1 agreement over documents, paired token by token.

    documents, tokens: how many documents (null: all that are long enough), tokens of each.
    decode_tokens: of them, the last ones are computed one at a time, through the decode path; null
        is 256 on a GPU and 32 elsewhere.
    decode_driver: of that path, see `model.decode.Decoder`; `auto` captures on a GPU.
    noise_floor: also measure the full cache against itself with chunks of half the size.
    """

    name = "text_loss"
    history = ("nll",)
    awaited = "perplexity"

    def __init__(
        self, documents: int | None = 3, tokens: int = 4096, decode_tokens: int | None = None,
        decode_driver: Driver = "auto", noise_floor: bool = True,
    ):
        check_lengths(tokens, decode_tokens)
        check_driver(decode_driver)
        self.documents, self.tokens, self.decode_tokens = documents, tokens, decode_tokens
        self.decode_driver, self.noise_floor = decode_driver, noise_floor

    def params(self) -> dict:
        return {"tokens": self.tokens, "decode_tokens": self.decode_tokens}

    def parts(self, model) -> list[TextLoss]:
        return [with_decode_tokens(self, model)]

    def items(self, model, data, seed: int) -> list[Item]:
        found = data.documents(model.tokenizer, self.documents, self.tokens)
        return [Item(f"document {n} of {len(found)}", np.asarray(d.ids))
                for n, d in enumerate(found, 1)]

    def beside(self, full: Runner) -> list[Runner]:
        told = f"{full.name} against itself, chunks of half the size"
        params = full.params | {"baseline": False, "control": told}
        floor = replace(full, name="noise floor", params=params, pieces=2, raws={}, stats=[])
        return [floor] if self.noise_floor else []

    def steps(self, item: Item, chunk_tokens: int) -> Iterator[tuple[int, int]]:
        return windows(len(item.context), chunk_tokens, self.decode_tokens)

    def kind(self, item: Item, span: tuple[int, int]) -> str:
        return "read" if span[0] < len(item.context) - self.decode_tokens else "decode"

    def step(self, runner: Runner, item: Item, span: tuple[int, int], full=None):
        start, stop = span
        ids = runner.held(item.context)
        runner.driver = self.decode_driver
        read = runner.read if self.kind(item, span) == "read" else runner.decode
        logits, targets = read(ids[start:stop]), ids[start + 1 : stop + 1]
        if not len(targets):
            return logits, {}
        own = logits[: len(targets)]
        if full is None:
            return logits, {"nll": nll(own, targets)}
        return logits, compare(own, full[: len(targets)], targets)._asdict()

    # -- rows

    def item_rows(self, mine: Runner, number: int) -> Iterator[Measurement]:
        raw = {k: float(np.mean(v, dtype=np.float64)) for k, v in mine.raws[number].items()}
        count = len(mine.raws[number]["nll"])
        ppl = float(np.exp(raw["nll"]))
        yield Measurement("document_perplexity", ppl, "", "lower", count=count)
        if "kl" in raw:
            yield Measurement("document_kl_mean_nats", raw["kl"], "nats", "lower", count=count)
            yield Measurement("document_top1_agreement_percent", 100 * raw["same"], "%", "higher",
                              count=count)

    def rows(self, mine: Runner, full: Runner, seed: int) -> Iterator[Measurement]:
        yield from decoded(mine, full, seed)
        yield from quality(mine, full, seed)

    def against(self, mine: Runner, kind: str, other: Runner, seed: int) -> Iterator[Measurement]:
        yield kl_minus(mine, kind, other, seed)

    def details(self, folder, mine: Runner, full: Runner, items, seed: int) -> None:
        if mine is not full:
            folder.curve("per_position", mine.name, **by_position(mine, full))


class BudgetLoss(TextLoss):
    """As `TextLoss`; variants of one budget are also paired with each other.

    Plain eviction is the control of what summarizes, retrieves or offloads under the same budget.
    Token by token, so what makes a text hard cancels, and an interval that excludes 0 is a
    difference.
    """

    name = "budget_loss"

    def versus(self, mine: Runner, other: Runner, seed: int) -> Iterator[Measurement]:
        if (mine.spec.bounded and other.spec.bounded and not is_plain(mine.spec)
                and is_plain(other.spec) and budget(mine.spec) == budget(other.spec)):
            name = other.spec.member.name
            own, theirs = mine.column("nll"), other.column("nll")
            ratio = stats.paired_ratio_percent(own, theirs, seed=seed)
            yield interval(f"perplexity_over_{name}_percent", ratio, "%", "lower", size(own))
            yield kl_minus(mine, name, other, seed)


def quality(mine: Runner, full: Runner, seed: int) -> Iterator[Measurement]:
    """Paired with the full cache; intervals are a bootstrap over documents and token blocks."""
    own, theirs, kl = mine.column("nll"), full.column("nll"), mine.column("kl")
    count = size(own)
    for name, losses in (("perplexity", own), ("perplexity_full", theirs)):
        found = stats.perplexity_interval(losses, seed=seed)
        yield interval(name, found, "", "lower", count)
    delta = stats.paired_ratio_percent(own, theirs, seed=seed)
    yield interval("perplexity_delta_percent", delta, "%", "lower", count)
    if not kl:
        return
    mean = stats.mean_interval(kl, seed=seed, least=0.0)
    yield interval("kl_mean_nats", mean, "nats", "lower", count)
    for name, q in (("p99", 0.99), ("p999", 0.999), ("max", 1)):
        tail = stats.quantile_interval(kl, q, seed=seed)
        yield interval(f"kl_{name}_nats", tail, "nats", "lower", count)
    same = stats.proportion_percent(mine.column("same"), seed=seed)
    yield interval("top1_agreement_percent", same, "%", "higher", count)


def decoded(mine: Runner, full: Runner, seed: int) -> Iterator[Measurement]:
    """The same over the tokens that came one at a time: what retrieval reads less, only they feel.

    Nothing for fewer than two such tokens. Blocks of the bootstrap are smaller than `quality`'s.
    """
    scored = mine.params.get("decode_tokens", 0) - 1  # the last token has no successor
    columns = [mine.column("nll"), full.column("nll"), mine.column("kl")]
    if scored < 1 or not columns[2]:
        return
    own, theirs, kl = ([x[-scored:] for x in column] for column in columns)
    delta = stats.paired_ratio_percent(own, theirs, block=DECODED_BLOCK, seed=seed)
    yield interval("perplexity_decoded_delta_percent", delta, "%", "lower", size(kl))
    mean = stats.mean_interval(kl, block=DECODED_BLOCK, seed=seed, least=0.0)
    yield interval("kl_decoded_mean_nats", mean, "nats", "lower", size(kl))
    same = [x[-scored:] for x in mine.column("same")]
    found = stats.proportion_percent(same, block=DECODED_BLOCK, seed=seed)
    yield interval("top1_decoded_agreement_percent", found, "%", "higher", size(same))


def by_position(mine: Runner, full: Runner) -> dict[str, np.ndarray]:
    """Arrays [P] for `RunFolder.curve`: loss minus the full cache's, KL in nats, top-1 in percent.

    Each with its interval (`low` and `high` are the loss's, then `kl_low`, ...), which is a point
    where all tokens of a bucket are alike.
    """
    curve = stats.position_intervals(mine.column("nll"), full.column("nll"))
    for name, column, unit, most in (("kl", "kl", 1, None), ("top1", "same", 100, 100)):
        values = [unit * np.asarray(x, dtype=np.float64) for x in mine.column(column)]
        if not values:
            continue
        found = stats.position_intervals(values, [np.zeros_like(x) for x in values])
        low, high = (np.clip(found[end], 0, most) for end in ("low", "high"))
        curve |= {name: found["nll_delta"], f"{name}_low": low, f"{name}_high": high}
    return curve


def kl_minus(mine: Runner, name: str, other: Runner, seed: int) -> Measurement:
    """KL to the full cache minus that of another runner, token by token."""
    gaps = [np.subtract(a, b, dtype=np.float64)
            for a, b in zip(mine.column("kl"), other.column("kl"))]
    found = stats.mean_interval(gaps, seed=seed)
    return interval(f"kl_minus_{name}_nats", found, "nats", "lower", size(gaps))


def is_plain(spec: CacheSpec) -> bool:
    """Whether what is evicted is gone."""
    return not (spec.summary.makes or spec.retrieval.selects or spec.offload.keeps)


def budget(spec: CacheSpec) -> tuple:
    division = spec.budget.name, *sorted(vars(spec.budget).items())
    return spec.budget_percent, spec.budget_bytes, spec.budget_blocks, division


def windows(tokens: int, chunk_tokens: int, decode_tokens: int) -> Iterator[tuple[int, int]]:
    """Prefill chunks up to the last `decode_tokens` tokens, then those, `DECODED_STEP` a span."""
    stop = tokens - decode_tokens
    for start in range(0, stop, chunk_tokens):
        yield start, min(start + chunk_tokens, stop)
    for start in range(stop, tokens, DECODED_STEP):
        yield start, min(start + DECODED_STEP, tokens)


def with_decode_tokens(task, model):
    """A copy of `task` whose `decode_tokens` are a number: what null stands for on this device."""
    made = copy(task)
    if made.decode_tokens is None:
        usual = 256 if model.model.device.type == "cuda" else 32
        made.decode_tokens = min(usual, made.tokens // 2)
    return made


def check_lengths(tokens: int, decode_tokens: int | None) -> None:
    """Raises `BadInput` for lengths that leave nothing to prefill."""
    if tokens < 2:
        raise BadInput("eval.tokens", tokens, "must be at least 2 to predict anything")
    if decode_tokens is not None and not 0 <= decode_tokens < tokens:
        raise BadInput(
            "eval.decode_tokens", decode_tokens,
            f"must lie between 0 and eval.tokens - 1 = {tokens - 1}",
        )
