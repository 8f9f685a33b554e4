"""Perplexity, divergence and bytes of runners that went through the documents in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from kvlab import stats
from kvlab.core import Measurement
from kvlab.eval.base import Runner, alive, windows
from kvlab.eval.divergence import compare, nll
from kvlab.model.load import LoadedModel

DECODED_BLOCK = 32  # tokens resampled together


def lockstep(
    loaded: LoadedModel, ids: torch.Tensor, baseline: Runner, runners: list[Runner],
    chunk_tokens: int, decode_tokens: int, show: Callable[[int], None] = lambda done: None,
    name: str = "the document",
) -> None:
    """Send one document, `ids` [T], through all caches window by window and keep token scores.

    The full cache and every variant see the same tokens in the same windows, so that differences
    are paired and no logits have to be stored. A runner that raises is left out from there on and
    keeps nothing of this document (`Runner.failure`); a full cache that does raises `RunFailed`.
    show: is told the tokens done. name: of the document, for what failed on it.
    """
    scores = {id(r): [] for r in (baseline, *runners)}
    with baseline.leading(f"{name}, at its start"):
        baseline.start(loaded)
    for runner in runners:
        with runner.surviving(f"{name}, at its start"):
            runner.start(loaded)
    for start, stop in windows(len(ids), chunk_tokens, decode_tokens):
        where, targets = f"{name}, tokens {start} to {stop}", ids[start + 1 : stop + 1]
        with baseline.leading(where):
            full = baseline.forward(loaded, ids[start:stop])[: len(targets)]
            if len(targets):
                scores[id(baseline)].append((nll(full, targets),))
        for runner in alive(runners):
            with runner.surviving(where):
                logits = runner.forward(loaded, ids[start:stop])[: len(targets)]
                if len(targets):
                    scores[id(runner)].append(compare(logits, full, targets))
        show(stop)
    with baseline.leading(f"{name}, at its end"):
        _finish(baseline, scores)
    for runner in alive(runners):
        with runner.surviving(f"{name}, at its end"):
            _finish(runner, scores)


def _finish(runner: Runner, scores: dict[int, list]) -> None:
    runner.finish()
    columns = [np.concatenate(c) for c in zip(*scores[id(runner)])]
    for kept, column in zip((runner.nll, runner.kl, runner.same), columns):
        kept.append(column)


def per_document(runner: Runner) -> Iterator[Measurement]:
    """The last document alone, under names of its own: known at once, and without intervals."""
    nats = runner.nll[-1]
    ppl = float(np.exp(np.mean(nats, dtype=np.float64)))
    yield Measurement("document_perplexity", ppl, "", "lower", count=len(nats))
    if not runner.kl:
        return
    kl, same = (float(np.mean(x[-1], dtype=np.float64)) for x in (runner.kl, runner.same))
    yield Measurement("document_kl_mean_nats", kl, "nats", "lower", count=len(nats))
    yield Measurement("document_top1_agreement_percent", 100 * same, "%", "higher",
                      count=len(nats))


def quality(runner: Runner, baseline: Runner, seed: int) -> Iterator[Measurement]:
    """Paired with the full cache; intervals are a bootstrap over documents and token blocks."""
    count = sum(map(len, runner.nll))
    ppl = stats.perplexity_interval(runner.nll, seed=seed)
    yield Measurement("perplexity", ppl.value, "", "lower", ppl.low, ppl.high, count)
    full = stats.perplexity_interval(baseline.nll, seed=seed)
    yield Measurement("perplexity_full", full.value, "", "lower", full.low, full.high, count)
    delta = stats.paired_ratio_percent(runner.nll, baseline.nll, seed=seed)
    yield Measurement("perplexity_delta_percent", *spread(delta, "%", "lower", count))
    if not runner.kl:
        return
    mean = stats.mean_interval(runner.kl, seed=seed)
    yield Measurement("kl_mean_nats", *spread(mean, "nats", "lower", count))
    for name, q in (("p99", 0.99), ("p999", 0.999), ("max", 1)):
        tail = stats.quantile_interval(runner.kl, q, seed=seed)
        yield Measurement(f"kl_{name}_nats", *spread(tail, "nats", "lower", count))
    same = stats.proportion_percent(runner.same, seed=seed)
    yield Measurement("top1_agreement_percent", *spread(same, "%", "higher", count))


def decoded(runner: Runner, baseline: Runner, seed: int) -> Iterator[Measurement]:
    """The same over the tokens that came one at a time: what retrieval reads less, only they feel.

    Nothing for fewer than two such tokens. Blocks of the bootstrap are smaller than `quality`'s.
    """
    scored = runner.params.get("decode_tokens", 0) - 1  # the last token has no successor
    if scored < 1 or not runner.kl:
        return
    nll, full, kl = ([x[-scored:] for x in of] for of in (runner.nll, baseline.nll, runner.kl))
    count = sum(map(len, kl))
    delta = stats.paired_ratio_percent(nll, full, block=DECODED_BLOCK, seed=seed)
    yield Measurement("perplexity_decoded_delta_percent", *spread(delta, "%", "lower", count))
    mean = stats.mean_interval(kl, block=DECODED_BLOCK, seed=seed)
    yield Measurement("kl_decoded_mean_nats", *spread(mean, "nats", "lower", count))


def against(runner: Runner, kind: str, control: Runner, seed: int) -> Measurement:
    """KL to the full cache minus that of a negative control, token by token."""
    differences = [a - b for a, b in zip(runner.kl, control.kl)]
    found = stats.mean_interval(differences, seed=seed)
    count = sum(map(len, differences))
    return Measurement(f"kl_minus_{kind}_nats", *spread(found, "nats", "lower", count))


def memory(runner: Runner) -> Iterator[Measurement]:
    """Bytes at the end of a document (the largest one), and the peak on the way."""
    end = max(runner.stats, key=lambda s: s.allocated_bytes)
    for name in ("nominal", "logical", "allocated", "host"):
        value = getattr(end, f"{name}_bytes")
        yield Measurement(f"cache_{name}_bytes", value, "B", "lower", count=end.tokens)
    yield Measurement("cache_peak_bytes", runner.peak_bytes, "B", "lower", count=end.tokens)
    yield Measurement("bits_per_element", end.bits_per_element, "bit", "lower", count=end.tokens)
    share = end.resident_tokens_percent
    yield Measurement("resident_tokens_percent", share, "%", None, count=end.tokens)
    yield Measurement("evictions", end.evictions, "blocks", None, count=end.tokens)
    if end.summary_fallbacks:
        fallbacks = end.summary_fallbacks
        yield Measurement("summary_fallbacks", fallbacks, "heads", "lower", count=end.tokens)


def spread(interval, unit: str, better: str, count: int):
    return interval.value, unit, better, interval.low, interval.high, count
