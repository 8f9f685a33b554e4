"""What measurements and variants are called on paper, and how numbers are written."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from kvlab.axes import TABLE

CONTROLS = ("random", "shuffled", "window", "chance")
FAMILIES = ("Quality", "Memory", "Speed", "Cache hits", "Other")


class Metric(NamedTuple):
    """A measurement name on paper. `unit` is "" for plain numbers, "bytes" is scaled per column."""

    name: str
    heading: str
    unit: str
    family: str
    better: str | None = None


def _family(family: str, *rows: tuple) -> list[Metric]:
    return [Metric(name, heading, unit, family, better) for name, heading, unit, better in rows]


KNOWN = {
    metric.name: metric
    for metric in [
        *_family(
            "Quality",
            ("perplexity_delta_percent", "perplexity change", "%", "lower"),
            ("kl_mean_nats", "KL mean", "nats", "lower"),
            ("top1_agreement_percent", "top-1 agreement", "%", "higher"),
            ("kl_p99_nats", "KL p99", "nats", "lower"),
            ("kl_p999_nats", "KL p99.9", "nats", "lower"),
            ("kl_max_nats", "KL max", "nats", "lower"),
            ("perplexity_decoded_delta_percent", "perplexity change, decoded tokens", "%", "lower"),
            ("kl_decoded_mean_nats", "KL mean, decoded tokens", "nats", "lower"),
            ("top1_decoded_agreement_percent", "top-1 agreement, decoded tokens", "%", "higher"),
            ("perplexity", "perplexity", "", "lower"),
            ("perplexity_full", "perplexity, full cache", "", "lower"),
            ("needle_recall_percent", "needle recall", "%", "higher"),
            ("needle_recall_full_percent", "needle recall, full cache", "%", "higher"),
            ("needle_recall_delta_points", "needle recall minus full cache's", "points", "higher"),
            *(
                (f"kl_minus_{c}_nats", f"KL mean minus {c} control's", "nats", "lower")
                for c in CONTROLS
            ),
            *(
                (
                    f"needle_recall_minus_{c}_points",
                    f"needle recall minus {c} control's",
                    "points",
                    "higher",
                )
                for c in CONTROLS
            ),
            ("task_score_percent", "score", "%", "higher"),
            ("task_score_delta_points", "score minus full cache's", "points", "higher"),
            ("task_score_full_percent", "score, full cache", "%", "higher"),
            *(
                (f"task_score_minus_{c}_points", f"score minus {c} control's", "points", "higher")
                for c in CONTROLS
            ),
            ("task_exact_percent", "exactly right", "%", "higher"),
            ("task_copied_percent", "copied before the first error", "%", "higher"),
            ("task_miscopied_percent", "found but miscopied", "%", "lower"),
            ("task_same_answers_percent", "same answers as the full cache", "%", "higher"),
            ("task_answer_tokens", "answer", "tokens", None),
            ("task_answer_longer_tokens", "answer longer than full cache's", "tokens", None),
            ("task_ttft_ms", "time to first token of later requests", "ms", "lower"),
            ("task_ttft_saved_percent", "time to first token saved", "%", "higher"),
            ("needle_answer_delta_nats", "loss of answers minus full cache's", "nats", "lower"),
        ),
        *_family(
            "Memory",
            ("cache_nominal_bytes", "nominal", "bytes", "lower"),
            ("cache_logical_bytes", "in use", "bytes", "lower"),
            ("cache_allocated_bytes", "allocated", "bytes", "lower"),
            ("cache_host_bytes", "on the host", "bytes", "lower"),
            ("peak_device_bytes", "peak on device", "bytes", "lower"),
            ("peak_reserved_bytes", "peak reserved on device", "bytes", "lower"),
            ("decode_bytes", "read by a step of decoding", "bytes", "lower"),
            ("bits_per_element", "bits per element", "", "lower"),
            ("effective_bits", "bits per element seen", "", "lower"),
            ("resident_tokens_percent", "resident tokens", "%", None),
        ),
        *_family(
            "Speed",
            ("decode_tokens_per_second", "decode", "tokens/s", "higher"),
            ("prefill_tokens_per_second", "prefill", "tokens/s", "higher"),
            ("prefill_seconds", "prefill of the prompt", "s", "lower"),
            ("decode_ms", "step of decoding", "ms", "lower"),
            ("decode_replay_ms", "replay of a captured step", "ms", "lower"),
            ("decode_percent_of_copy", "share of a copy's rate", "%", "higher"),
            ("output_tokens_per_second", "output", "tokens/s", "higher"),
            ("ttft_p50_ms", "time to first token, median", "ms", "lower"),
            ("ttft_p99_ms", "time to first token, p99", "ms", "lower"),
            ("tpot_p50_ms", "time of an output token, median", "ms", "lower"),
            ("tpot_p99_ms", "time of an output token, p99", "ms", "lower"),
            ("ttft_speedup", "time to first token, cold over known", "x", "higher"),
            ("ms_saved", "time to first token saved", "ms", "higher"),
            ("decode_attention_us", "decode attention", "µs", "lower"),
            ("ttft_ms", "time to first token", "ms", "lower"),
            ("ttft_cold_ms", "time to first token, cold", "ms", "lower"),
            ("evictions_per_second", "evictions", "1/s", "lower"),
        ),
        *_family(
            "Cache hits",
            ("block_hit_percent", "block hits", "%", "higher"),
            ("token_hit_percent", "token hits", "%", "higher"),
            ("flops_saved_percent", "FLOPs saved", "%", "higher"),
            ("evictions", "evictions", "", None),
            ("working_set_blocks", "working set", "blocks", None),
            ("thrash_percent", "thrash", "%", "lower"),
        ),
    ]
}
SUFFIXES = (
    ("_tokens_per_second", "tokens/s"),
    ("_per_second", "1/s"),
    ("_percent", "%"),
    ("_bytes", "bytes"),
    ("_seconds", "s"),
    ("_nats", "nats"),
    ("_ms", "ms"),
    ("_us", "µs"),
)


# Parts of a variant's name that are settings -> what they mean.
SAYS = (
    (r"(\d+(?:\.\d+)?)%", "{} %"),
    (r"cache\.budget_blocks=(\d+)|(\d+) blocks", "{} blocks"),
    (r"retrieval\.budget_tokens=(\d+)", "{} tokens read"),
    (r"window\.recent=(\d+)", "{} recent"),
    (r"window\.sinks=(\d+)", "{} sinks"),
    (r"(\d+)\+(\d+)", "{} sinks + {}"),  # as a search names a window
    (r"cache\.block_size=(\d+)|b(\d+)|block (\d+)", "blocks of {}"),
    (r"cache\.evict=token", "by token"),
    (r"cache\.evict=block", "whole blocks"),
    (r"cache\.groups=per_head", "by head"),
    (r"cache\.groups=per_layer", "by layer"),
    (r"cache\.groups=all", "all layers alike"),
    (r"window\.rerotate=[Tt]rue", "positions moved up"),
    (r"window\.middle=[Ff]alse", "nothing between"),
    (r"retrieval\.digests=(\w+)", "digests in {}"),
    (r"summary\.ratio=(\S+)", "{} of the tokens as entries"),
    (r"cache\.kernels=(\w+)", "read by {}"),
    (r"format\.sinks=(\d+)", "{} sinks as computed"),
    (r"format\.(key|value)\.axis=(\w+)", "{}s scaled by {}"),
    (r"retrieval\.recent=(\d+)", "{} recent read"),
)
OF_AXES = {"host": "rest on the host", "sink": "window", "hash": "shared prefixes",
           "merge_mean": "means without mass"}  # fmt: skip
# Members that are named for what they do; a method that was published keeps its authors' name.
OF_MEMBERS = {"attention_mass": "attention mass", "expected_attention": "expected attention",
              "key_norm": "key norm", "mean_key": "mean keys", "random": "random",
              "shuffled": "shuffled", "hybrid": "hybrid", "adaptive": "adaptive",
              "leaf_first": "leaf first", "priority": "priority", "s3fifo": "S3-FIFO",
              "rkv": "R-KV"}  # fmt: skip
PEERS = {  # caches of the library and other systems, as the jobs of speed name their rows
    "static fused graph": "transformers' static cache, fused layers",
    "dynamic eager": "transformers' dynamic cache",
    "dynamic whole": "transformers' dynamic cache, in one piece",
    "dynamic chunked": "transformers' dynamic cache, in chunks",
    "continuous sdpa": "transformers' continuous batching, SDPA",
    "continuous flash 2": "transformers' continuous batching, FlashAttention 2",
}


def words(variant: str) -> str:
    """A variant's name as a reader would say it: `snapkv 10% cache.evict=token` -> `SnapKV, 10 %,
    by token`; what a token reads comes first. A name that begins neither with a member of an axis
    nor with a setting of one stays as it is."""
    body, bracket, more = variant.partition(" (")
    first = body.partition(" ")[0]
    setting = first.partition(".")[0] in (*TABLE, "cache") and "=" in first
    setting |= first in CONTROLS
    if not setting and not any(first in axis.members for axis in TABLE.values()):
        return PEERS.get(variant, variant)
    parts = re.sub(r" (?=blocks\b)|(?<=\bblock) (?=\d)", "\0", body).split()
    evicts = any(_of(part, "policy") or part == "random" for part in parts)
    parts.sort(key=lambda part: _place(part, evicts))  # stable
    told = ", ".join(filter(None, (_words(part, parts, evicts) for part in parts)))
    return told.replace("shuffled, ", "shuffled ") + bracket + more


def _of(part: str, axis: str) -> bool:
    """Whether a part of a name is of that axis: a member in earnest, or a setting of it."""
    member = part in TABLE[axis].members and part not in (TABLE[axis].null, "random")
    return member or part.startswith(f"{axis}.")


def _place(part: str, evicts: bool) -> int:
    """Format, what a token reads, all else, and last what a policy has to keep."""
    if _of(part, "format"):
        return 0
    kept = part in ("sink", "window") or part.startswith("window.") or "+" in part
    return 1 if _of(part, "retrieval") else 3 if evicts and kept else 2


def _words(part: str, parts: list[str], evicts: bool) -> str:
    """parts: all of the name; a window beside a policy says what the policy has to keep."""
    part = part.replace("\0", " ")
    if evicts and part in ("sink", "window"):
        alone = not any(p.startswith("window.recent=") or "+" in p for p in parts)
        return "newest kept" if alone else ""
    for pattern, said in SAYS:
        found = re.fullmatch(pattern, part)
        if found:
            told = [f"{int(g):,}" if g.isdigit() else g for g in found.groups() if g is not None]
            kept = evicts and (part.startswith("window.recent=") or "+" in part)
            on_device = part.endswith("%") and "host" in parts
            end = " newest kept" * ("+" in part) if kept else " newest" * ("+" in part)
            said = said.replace("recent", "newest kept") if kept else said
            text = said.format(*told)
            one = told == ["1"] and text.startswith("1 ")
            return (text.removesuffix("s") if one else text) + end + " on the device" * on_device
    if part == "random" and parts.index(part) and any(_of(p, "policy") for p in parts):
        return part if any(_of(p, "retrieval") for p in parts) else "random entries"
    if part == "host" and any(p.endswith("%") for p in parts):
        return "" if any(_of(p, "retrieval") for p in parts) else OF_AXES[part]
    if part in OF_AXES or part in OF_MEMBERS:
        return OF_AXES.get(part) or OF_MEMBERS[part]
    for axis in ("policy", "retrieval"):
        if part in TABLE[axis].members and part != TABLE[axis].null:
            return TABLE[axis].members[part].path.rpartition(".")[2]
    return part


def metric(name: str, unit: str = "", better: str | None = None) -> Metric:
    """The metric of a name; of an unknown one what its suffix, `unit` and `better` tell."""
    if name in KNOWN:
        return KNOWN[name]
    heading, told = re.sub(r"^kl_minus_(\w+)_nats$", r"KL mean minus \1's_nats", name), unit
    told = "bytes" if told == "B" else told
    for suffix, means in SUFFIXES:
        if heading.endswith(suffix) and heading != suffix:
            heading, told = heading.removesuffix(suffix), means
            break
    return Metric(name, heading.replace("_", " "), told, "Other", better)


def order(names: list[str]) -> list[str]:
    """Known names in the order above, then the others as they came."""
    rank = {name: place for place, name in enumerate(KNOWN)}
    return sorted(dict.fromkeys(names), key=lambda name: rank.get(name, len(rank)))


def byte_unit(largest: float) -> tuple[float, str]:
    """Divisor and unit that make `largest` a number between 1 and 1024."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    if not (math.isfinite(largest) and largest > 0):
        return 1.0, units[0]
    step = min(int(math.log(largest, 1024)), len(units) - 1)
    return 1024.0**step, units[step]


def arrow(better: str | None) -> str:
    return {"higher": " ↑", "lower": " ↓"}.get(better, "")


def number(value: float, spread: float | None = None, size: float | None = None) -> str:
    """`value` with as many digits as its spread (half a 95 % interval) supports, or a few.

    `size` is the magnitude that decides on powers of ten, where several numbers stand together.
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    size = abs(value) if size is None else size
    if 0 < size < 1e-4 or size >= 1e15:
        return f"{value:.1e}" if value else "0"
    if spread and math.isfinite(spread):
        digits = -math.floor(math.log10(spread / 3))
    elif size >= 1:
        digits = min(3 - math.floor(math.log10(size)), 2)
    else:
        digits = 2 - math.floor(math.log10(size)) if size else 0
    return f"{value:,.{min(max(digits, 0), 6)}f}"


def interval(value: float, low: float | None, high: float | None, scale: float = 1.0) -> str:
    """`1.23 [1.20, 1.26]`, all divided by `scale`; the value alone where no interval is."""
    if low is None or high is None:
        return number(value / scale)
    value, low, high = value / scale, low / scale, high / scale
    spread, size = (high - low) / 2, max(abs(value), abs(low), abs(high))
    texts = [number(x, spread, size if math.isfinite(size) else None) for x in (value, low, high)]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"
