"""The answer in words: a table, then what each composition forgets and how it is had."""

from __future__ import annotations

import shlex
from textwrap import TextWrapper

from kvlab.advice.ask import GOALS, Ask
from kvlab.advice.choices import PARTLY, SPARE, TOO_MUCH, Choice, choices, dominated
from kvlab.advice.columns import columns
from kvlab.advice.evict import FORGETS as EVICTED
from kvlab.advice.evict import TRANSFORMERS, VLLM, Evicting, evicting, least
from kvlab.advice.flags import nearest
from kvlab.advice.speed import decoding, prefilling, timed_shapes
from kvlab.advice.table import (
    BLOCK_SIZE,
    CHUNK_TOKENS,
    Loss,
    formats,
    losses,
    models,
    nearest_speed,
)
from kvlab.advice.transfer import elsewhere
from kvlab.core import CacheGeometry
from kvlab.model import Outline, outline
from kvlab.pool import no_kernels

_ROOMY = 110  # columns from which on the table has all bytes
_MEASURED = 32768  # tokens of a document that the bundled books have


def advise(ask: Ask, config: dict, width: int = 100) -> str:
    """What fits `ask`, for the model that `config` (a `config.json`) describes; no weights needed.

    Raises `BadInput` for a model that no `PagedCache` can serve.
    """
    model = outline(config)
    found = choices(ask, model)
    parts = [_head(ask, model, width), _table(found, width), _sources(width)]
    fitting = advised(found)
    parts += [_one(choice, ask, model, width) for choice in shown(fitting, ask)]
    if ask.goal in (None, "stream"):
        parts.append(_evictions(evicting(ask, model), ask, model, width))
    if fitting and not ask.goal:
        parts.append(_fill("Of each goal the one with the least loss is told, with and without "
                           "host memory; goal=... tells all that fit.", width))
    if not fitting:
        least = min((choice.needed for choice in found if not choice.loses), default=None)
        parts.append("Nothing of these fits" + (
            f": the smallest needs {_gb(least)} in all. Fewer requests, a shorter context, or "
            "goal=stream, whose bytes do not grow." if least else
            f": a window of {ask.context:,} tokens would hold them all; ask for another goal."))
    return "\n\n".join(parts)


def advised(found: list[Choice]) -> list[Choice]:
    """What fits and does not lose too much."""
    return [choice for choice in found if choice.fits and not choice.loses]


def shown(fitting: list[Choice], ask: Ask) -> list[Choice]:
    """All of the goal that was asked for; else of each goal the first, which loses least, and the
    first without host memory."""
    if ask.goal:
        return fitting
    ways = [{c.goal: c for c in reversed(fitting) if c.deed not in without}
            for without in ((), ("host",))]  # fmt: skip
    return [c for c in fitting if any(way.get(c.goal) is c for way in ways)]


def _head(ask: Ask, model: Outline, width: int) -> str:
    shapes = model.portrait.shapes
    each = sum(shape.elements for shape in shapes) * 2
    told = (f"{len(shapes)} layers, {shapes[0].kv_heads} key/value heads of {shapes[0].k_width}: "
            f"{each:,} bytes a token in bf16; weights {_gb(model.parameters * 2)} in 16 bits. "
            f"{ask.requests} request(s) of {ask.context:,} tokens on {ask.memory_gb:g} GB (10^9 "
            f"bytes), of which one part in {SPARE} stays free. Blocks of {BLOCK_SIZE}, chunks of "
            f"{CHUNK_TOKENS}: with these the losses were measured.")
    if model.positions and ask.context > model.positions:
        told += (f" The model was made for {model.positions:,} positions: beyond them it may fail "
                 "whatever the cache, unless text leaves by a window.")
    return _fill(told, width)


def _table(found: list[Choice], width: int) -> str:
    """Bytes in full where there is room; they stand beneath, too."""
    wide = width >= _ROOMY
    names = [f"ppl %, {n.removesuffix('-Instruct')}".replace("-", "- "[not wide]) for n in models()]
    head = ["goal", "composition", "fits", *["now", "end", "host, end"] * wide, "needed in all",
            *names, "another model"]  # fmt: skip
    rows = [[c.goal, c.name, _fits(c),
             *[_gb(c.now.device), _gb(c.end.device), _gb(c.end.host) if c.end.host else ""] * wide,
             _gb(c.needed), *_of_models(c), _another(c)] for c in found]  # fmt: skip
    return columns(head, rows, width)


def _of_models(choice: Choice) -> list[str]:
    """Change in perplexity of all that it loses, one for each model."""
    rows = {row.model: row.perplexity.told(".2f") for row in choice.whole}
    return [rows.get(name, "not measured") for name in models()]


def _another(choice: Choice) -> str:
    """Change in perplexity on a model that was not measured."""
    there = elsewhere(choice.losses) if choice.known else None
    return f"{there.perplexity.low:+.1f} to {there.perplexity.high:+.1f}" if there else ""


def _fits(choice: Choice) -> str:
    if not choice.fits:
        return "no"
    return "loses" if choice.loses else "yes"


def _sources(width: int) -> str:
    rows = losses()
    told = ["ppl %: change in perplexity, mean and 95 % interval, on models that may not be yours: "
            "of the format, of a window, or of a choice of blocks. Another model: the 95 % "
            "interval of a model that was not measured, by how much these differ from each other "
            "over all formats."]
    told.append("speed: of the nearest row that was measured; a model with more weights or a wider "
                "cache than the shapes that are named is slower.")
    told.append(f"loses: it fits, and is not advised, for the interval reaches {TOO_MUCH:g} %.")
    for name in models():
        row = next(row for row in rows if row.model == name)
        told.append(f"{name}: {row.setting}, on {row.device} at commit {row.commit}.")
    out = [" ".join(o).removeprefix("format=") for o in formats() if dominated(o)]
    if out:
        told.append(f"Left out, for others take no more bits and lose less: {', '.join(out)}.")
    return "\n".join(_fill(line, width) for line in told)


def _one(choice: Choice, ask: Ask, model: Outline, width: int) -> str:
    from_format = next(o for o in choice.options if o.startswith("format=")).partition("=")[2]
    vllm, transformers = nearest(from_format, choice.deed)
    lines = [f"{choice.name}  ({choice.goal}: {GOALS[choice.goal]})"]
    host = f" and {_gb(choice.end.host)} in host memory" if choice.end.host else ""
    ends = f"{_gb(choice.end.device)}{host} at the end"
    lines += _labelled("bytes", f"{_gb(choice.now.device)} at {ask.now:,} tokens, {ends}", width)
    lines += _labelled("loss", _loss(choice), width)
    lines += _labelled("forgets", choice.forgets, width)
    lines += _labelled("speed", _speed(choice, ask, model), width)
    lines += [f"  command       {command(choice, ask, model)}", f"  Python        {python(choice)}"]
    lines += _labelled("vLLM", vllm, width) + _labelled("transformers", transformers, width)
    return "\n".join(lines)


def _evictions(found: list[Evicting], ask: Ask, model: Outline, width: int) -> str:
    """What was measured of eviction, which serves no goal by itself: some of the text is gone."""
    head = _fill("Where some of the text may be gone, tokens can be evicted; bytes are about the "
                 "share of a full cache, losses are of the lengths that are named. Of each share "
                 "what loses least, with a summary of what is gone and without:", width)
    blocks = [head]
    for one in least(found):
        lines = [f"{one.name}  (about {_gb(one.bytes)} at the end)"]
        for row in one.losses:
            lines += _labelled("loss", f"{_figures(row)} ({row.setting}; {row.device}, commit "
                                       f"{row.commit[:7]})", width)  # fmt: skip
        options = tuple(o for o in one.options if o != "format=bf16")
        own = one.block_size, one.chunk_tokens  # both are part of what was measured
        lines.append(f"  command       {command_of(options, ask, model, *own)}")
        lines.append(f"  Python        {python_of(options, one.block_size)}")
        blocks.append("\n".join(lines))
    last = [*_labelled("forgets", EVICTED, width), *_labelled("vLLM", VLLM, width),
            *_labelled("transformers", TRANSFORMERS, width)]  # fmt: skip
    return "\n".join([*blocks, "each of these", *last])


def _figures(row: Loss) -> str:
    top1 = f", top-1 {row.top1.told('.1f')} %" if row.top1 else ""
    return (f"{row.model}: perplexity {row.perplexity.told('+.2f')} %, KL {row.kl.told('.2g')} "
            f"nats{top1}")


def _loss(choice: Choice) -> str:
    told = [_figures(row) for row in choice.losses if row.kl]
    base = "; ".join(told) or "none: it is what the others are compared with"
    if there := elsewhere(choice.losses):
        base += f"; on another model {there.told()}"
    if choice.deed not in PARTLY:
        return base
    window = choice.deed == "window"
    if not choice.beside:
        own = "the window loses" if window else "it loses by not reading all"
        return f"not measured: what {own} is not in the table. Of the format alone: {base}"
    parts = "; ".join(f"{_figures(row)} ({row.setting}; {row.device}, commit {row.commit[:7]})"
                      for row in choice.beside)  # fmt: skip
    parts = parts if window else f"of decoded tokens, {parts}"
    if choice.known:
        return parts
    own = "window" if window else "choice"
    return (f"not measured: the format and the {own} together. Of the {own} in 16 bits: {parts}. "
            f"Of the format alone: {base}")


def _speed(choice: Choice, ask: Ask, model: Outline) -> str:
    why = no_kernels(choice.spec.format, model.portrait.shapes[0])
    rows = [row for row in choice.losses if row.prefill_tokens_per_second
            and row.device == ask.device and row.kernels == (why is None)]  # fmt: skip
    told = "; ".join(
        f"{row.model} prefilled {row.prefill_tokens_per_second:,.0f} tokens/s on {row.device}"
        + ", which had other work: no figure to plan by" * row.loaded for row in rows)
    known = _known_speed(choice, ask, model)
    if known:
        told = known
    elif not told or choice.deed:
        told = f"not measured on {ask.device}" if ask.device else (
            "not measured on your device (device.name=... looks one up)")  # fmt: skip
    return told + (f"; slow, by plain torch: {why}" if why else "")


def _known_speed(choice: Choice, ask: Ask, model: Outline) -> str:
    """What the tables of speeds say of this composition: at the length that was asked for where
    rows of its shapes lie around it, else the nearest row; another device than the one that was
    named is no answer."""
    told = _estimates(choice, ask, model)
    if not told:
        found = [nearest_speed(choice.options, kind, ask.context, ask.requests, ask.device)
                 for kind in ("decode", "prefill")]  # fmt: skip
        for row in filter(None, found):
            other = [o for o in row.options if o not in choice.options]
            told.append(row.told() + f" with {' '.join(other)}" * bool(other)
                        + ", a window of its own length" * ("window=sink" in row.options))
    if told and not ask.device:
        told.append("your device: device.name=... says whether it was measured")
    return "; ".join(told)


def _estimates(choice: Choice, ask: Ask, model: Outline) -> list[str]:
    if not timed_shapes(model):
        return []
    g = CacheGeometry.of(model.portrait.shapes, model.portrait.query_heads, BLOCK_SIZE)
    decoded = decoding(choice.options, choice.spec, g, ask.context, ask.requests, ask.device)
    if decoded is None:
        return []
    at = f"{ask.context:,} tokens" + f" x {ask.requests} sequences" * (ask.requests > 1)
    row = decoded.rows[0]
    told = [f"decodes about {decoded.value:,.{int(decoded.value < 10)}f} tokens/s at {at} (between "
            f"rows of {decoded.sources}; {row.model}, {row.device})"]  # fmt: skip
    read = prefilling(choice.options, choice.spec, g, ask.context, ask.device)
    if read is not None:
        told.append(f"prefills about {read.value:,.0f} tokens/s in chunks of "
                    f"{read.rows[0].chunk_tokens:,} ({read.sources})")  # fmt: skip
    return told


def command(choice: Choice, ask: Ask, model: Outline) -> str:
    """What measures this choice on the model that was asked for."""
    return command_of(choice.options, ask, model)


def command_of(
    options: tuple[str, ...], ask: Ask, model: Outline, block_size: int = BLOCK_SIZE,
    chunk_tokens: int = CHUNK_TOKENS,
) -> str:  # fmt: skip
    tokens = min(ask.context, _MEASURED, model.positions or _MEASURED)
    words = [*ask.model, "experiment=none", *options, f"cache.block_size={block_size}",
             f"prefill.chunk_tokens={chunk_tokens}", f"eval.tokens={tokens}"]  # fmt: skip
    return shlex.join(["python", "-m", "kvlab", *words])


def python(choice: Choice) -> str:
    """The line that makes the cache."""
    return python_of(choice.options)


def python_of(options: tuple[str, ...], block_size: int = BLOCK_SIZE) -> str:
    named, settings = {}, {}
    for word in options:
        key, _, value = word.partition("=")
        group, _, field = key.partition(".")
        if field:
            settings.setdefault(group, []).append(f"{field}={value.title()}")
        else:
            named[group] = value
    own = []
    for axis, name in named.items():
        if axis in settings:
            made = ", ".join([repr(name), *settings[axis]])
            own.append(f'{axis}=kvlab.axes.by_name("{axis}", {made})'.replace("'", '"'))
        else:
            own.append(f'{axis}="{name}"')
    own += [f"block_size={block_size}", *settings.get("cache", ())]
    return f"kvlab.PagedCache.for_model(model, {', '.join(own)})"


def _labelled(name: str, text: str, width: int) -> list[str]:
    wrapper = TextWrapper(max(60, width), initial_indent=f"  {name:14}",
                          subsequent_indent=" " * 16, break_long_words=False,
                          break_on_hyphens=False)  # fmt: skip
    return wrapper.wrap(text)


def _fill(text: str, width: int) -> str:
    return TextWrapper(max(60, width), break_on_hyphens=False).fill(text)


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
