"""What a reader should take away, in at most three sentences: the author's, else the numbers'."""

from __future__ import annotations

import re

import numpy as np

from kvlab.report.entries import Entry, names
from kvlab.report.hit_rates import hits, is_bound
from kvlab.report.names import interval, metric, number, words

MOST = 3
GOOD = 1.0  # % of perplexity, at the upper end of its interval: a small loss
LOSSES = ("kl_mean_nats", "perplexity_delta_percent")
FOUND = ("needle_recall_percent", "task_score_percent")
SPEEDS = ("decode_tokens_per_second", "prefill_tokens_per_second", "ttft_ms")


def verdict(everything: list[Entry], rows: list[dict], text: str) -> str:
    """One paragraph; "" where nothing can be said."""
    own = authors(text)
    if own:
        return own
    told = [say(everything) for say in (_least, _smallest, _found, _controls, _fastest)]
    told = [sentence for sentence in told if sentence] or _hits(rows)
    return " ".join(told[:MOST])


def authors(text: str) -> str:
    """The first sentences of a paragraph that begins with `**Verdict.**`."""
    found = re.search(r"^\*\*Verdict\.\*\*\s+(.+?)(?=\n\s*\n|\Z)", text, re.M | re.S)
    if not found:
        return ""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z`*\"])", " ".join(found[1].split()))
    return " ".join(sentences[:MOST]).removesuffix(":")


def without_verdict(text: str) -> str:
    """The author's text less a verdict that stands whole above it."""
    own = authors(text)
    found = re.search(r"^\*\*Verdict\.\*\*\s+(.+?)(?=\n\s*\n|\Z)", text, re.M | re.S)
    if found and " ".join(found[1].split()) == own:
        return (text[: found.start()] + text[found.end() :]).strip()
    return text


def in_earnest(everything: list[Entry]) -> list[Entry]:
    """Neither the full cache, nor a control or noise floor, nor the library's caches."""
    return [e for e in everything if not (e.is_baseline or e.control or e.failure)]


def _least(everything: list[Entry]) -> str:
    """Who loses least."""
    name = next((n for n in LOSSES if n in names(everything)), None)
    there = [e for e in in_earnest(everything) if name in e.rows and e.value(name) == e.value(name)]
    if name is None or len(there) < 2:
        return ""
    best = min(there, key=lambda e: abs(e.value(name)))
    return (f"Of {len(there)} variants {_named(best, there)} stays nearest to the full cache: "
            f"{_told(best, LOSSES)}{_bytes(best)}.")  # fmt: skip


def _smallest(everything: list[Entry]) -> str:
    """The fewest bytes at a small loss."""
    name = "perplexity_delta_percent"
    there = [e for e in in_earnest(everything) if name in e.rows and e.bytes_ratio is not None]
    if not there:
        return ""
    good = [e for e in there if (e.rows[name]["high"] or e.value(name)) < GOOD
            and e.bytes_ratio < 1]  # fmt: skip
    if not good:
        return f"None saves bytes at less than {GOOD:g} % of perplexity, by its interval."
    best = min(good, key=lambda e: e.bytes_ratio)
    return (f"The fewest bytes at less than {GOOD:g} % of perplexity, by its interval, takes "
            f"{_named(best, there)}: {best.bytes_ratio:.2f} of the full cache's at "
            f"{_told(best, (name,))}.")  # fmt: skip


def _found(everything: list[Entry]) -> str:
    name = next((n for n in FOUND if n in names(everything)), None)
    there = [e for e in in_earnest(everything) if name in e.rows]
    if name is None or not there:
        return ""
    best, worst = (pick(there, key=lambda e: e.value(name)) for pick in (max, min))
    about = metric(name)
    told = f"{about.heading[:1].upper()}{about.heading[1:]} is {_cell(best, name)} %"
    if len(there) == 1 or best.value(name) == worst.value(name):
        return f"{told} for {'all' if len(there) > 1 else _named(best, there)}."
    return (f"{told} with {_named(best, there)} and {_cell(worst, name)} % with "
            f"{_named(worst, there)}.")  # fmt: skip


def _controls(everything: list[Entry]) -> str:
    """How many beat what knows nothing, by the interval of a paired difference."""
    there = in_earnest(everything)
    paired = [(e, r) for e in there for n, r in e.rows.items()
              if "_minus_" in n and r["low"] is not None]  # fmt: skip
    if not paired:
        return ""
    beat = sum(r["high"] < 0 if r["better"] == "lower" else r["low"] > 0 for _, r in paired)
    lost = sum(r["low"] > 0 if r["better"] == "lower" else r["high"] < 0 for _, r in paired)
    return (f"Against the controls, {beat} of {len(paired)} paired differences are wins outside "
            f"the 95 % interval and {lost} are losses.")  # fmt: skip


def _fastest(everything: list[Entry]) -> str:
    """The fastest at the longest context, where speeds count."""
    name = next((n for n in SPEEDS if n in names(everything)), None)
    there = [e for e in everything if name in e.rows and not e.failure and not e.run.loaded]
    if name is None or len(there) < 2:
        return ""
    longest = max(_length(e) for e in there)
    last = [e for e in there if _length(e) == longest]
    less = metric(name).better == "lower"
    best = (min if less else max)(last, key=lambda e: e.value(name))
    about = metric(name)
    where = f" at {longest:,g} tokens" if longest else ""
    full = best.baseline.value(name) if best.baseline and best.baseline in last else None
    beside = f", the full cache {number(full)}" if full and not best.is_baseline else ""
    return (f"{about.heading[:1].upper()}{about.heading[1:]}{where}: {_named(best, last)} is "
            f"fastest with {_cell(best, name)} {about.unit}{beside}.")  # fmt: skip


def _hits(rows: list[dict]) -> list[str]:
    """Of replayed traces: the best policy at the middle capacity of each."""
    found = []
    told = [r for r in hits(rows)
            if "capacity_blocks" in r["params"] and not is_bound(r["variant"])]  # fmt: skip
    for trace in dict.fromkeys(r["params"].get("trace") for r in told):
        mine = [r for r in told if r["params"].get("trace") == trace]
        sizes = sorted({r["params"]["capacity_blocks"] for r in mine})
        middle = sizes[len(sizes) // 2]
        there = [r for r in mine if r["params"]["capacity_blocks"] == middle]
        best, worst = (pick(there, key=lambda r: r["value"]) for pick in (max, min))
        if best["variant"] != worst["variant"]:
            found.append(
                f"{trace}, {middle:,} blocks: {words(best['variant'])} hits most with "
                f"{best['value']:.1f} % of blocks, {words(worst['variant'])} least with "
                f"{worst['value']:.1f} %.")  # fmt: skip
    return found


def _length(entry: Entry) -> float:
    return next((r["params"]["tokens"] for r in entry.rows.values()
                 if isinstance(r["params"].get("tokens"), int)), 0)  # fmt: skip


def _named(entry: Entry, among: list[Entry]) -> str:
    """The variant in words, with what tells it from its namesakes."""
    twins = [e for e in among if e.variant == entry.variant]
    parts = [entry.run.label] * (len({e.run.name for e in twins}) > 1)
    parts += [f"{k.replace('_', ' ')} {v}" for k, v in entry.conditions.items()
              if len({str(e.conditions.get(k)) for e in twins}) > 1]  # fmt: skip
    return words(entry.variant) + (f" ({', '.join(parts)})" if parts else "")


def _told(entry: Entry, wanted: tuple[str, ...]) -> str:
    return ", ".join(f"{metric(n).heading} {_cell(entry, n)} {metric(n).unit}"
                     for n in wanted if n in entry.rows)  # fmt: skip


def _cell(entry: Entry, name: str) -> str:
    row = entry.rows[name]
    return interval(row["value"], row["low"], row["high"])


def _bytes(entry: Entry) -> str:
    ratio = entry.bytes_ratio
    return "" if ratio is None or not np.isfinite(ratio) else f", at {ratio:.2f} of its bytes"
