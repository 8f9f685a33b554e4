"""Programs as plain data: what they may contain, how one is drawn, how it prints."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .models import MODELS

NO_CACHE, BASELINE = -1, 2  # slots: 0 and 1 hold the cache under test, 2 the library's own
MASKS = (
    "none", "ones", "left", "right", "holes", "ended", "hide_past", "hide_first", "unhide",
    "column", "short", "long", "new_only", "one_row",
    "bool4d", "float4d", "bool4d_left", "float4d_left", "bool4d_pattern", "float4d_pattern",
    "float4d_bias", "bool4d_both_ways", "bool4d_heads", "bool4d_one_row", "bool4d_new_only",
)
POSITIONS = ("default", "cumsum", "row", "all", "shifted", "repeated", "packed", "ones_for_pads")


@dataclass(frozen=True)
class Setup:
    """Model and cache. `attention` is that of the library's side; `old_name` says past_key_values
    where the library has another word by now."""

    model: str = "llama"
    cache: str = "paged"  # or dynamic, dynamic_config, static: on a model that was switched
    block: int = 4
    groups: str = "all"
    prefix: str = "none"
    workspace: int = 16384
    kernels: str = "torch"
    attention: str = "sdpa"
    old_name: bool = False


@dataclass(frozen=True)
class Forward:
    """One forward of `tokens` columns; `rows` counts where the slot is empty."""

    slot: int = 0
    tokens: int = 5
    rows: int = 1
    seed: int = 0
    mask: str = "none"
    positions: str = "default"
    embeds: bool = False
    keep: int | tuple[int, ...] = 0
    hidden: bool = False
    attentions: bool = False
    labels: bool = False
    use_cache: bool | None = None
    grad: bool = False


@dataclass(frozen=True)
class Generate:
    """`tokens` more columns of prompt, then `new` tokens."""

    slot: int = 0
    tokens: int = 5
    rows: int = 1
    seed: int = 0
    mask: str = "none"
    new: int = 4
    how: str = "greedy"  # sample, beams, beam_sample, lookup, assisted, own: kvlab's driver
    driver: str = "eager"  # of "own"
    chunk: int | None = None
    eos: tuple[int, ...] = ()
    embeds: bool = False
    hide_ended: bool = False  # later masks hide what a row got after its end
    implementation: str | None = None


@dataclass(frozen=True)
class Crop:
    slot: int = 0
    tokens: int = -1


@dataclass(frozen=True)
class Reorder:
    slot: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Repeat:
    slot: int = 0
    times: int = 2


@dataclass(frozen=True)
class Select:
    slot: int = 0
    seed: int = 0
    how: str = "index"  # mask, negative


@dataclass(frozen=True)
class Copy:
    slot: int = 0
    to: int = 1
    how: str = "deepcopy"  # pickle


@dataclass(frozen=True)
class Reset:
    slot: int = 0
    finish: bool = False  # end the request: what is known by its prefix stays known


@dataclass(frozen=True)
class Switch:
    """The model under test is set to another attention and stays so."""

    to: str = "sdpa"


@dataclass(frozen=True)
class Program:
    setup: Setup
    ops: tuple = ()

    def __str__(self) -> str:
        lines = ",\n    ".join(map(brief, self.ops))
        return f"Program({brief(self.setup)}, (\n    {lines},\n))"


def brief(item) -> str:
    """`item` as Python, without what has its default."""
    plain = type(item)()
    told = [f"{k}={v!r}" for k, v in vars(item).items() if v != getattr(plain, k)]
    return f"{type(item).__name__}({', '.join(told)})"


def draw(rng: random.Random, kernels: str = "torch") -> Program:
    """A program of one to seven operations."""
    setup = draw_setup(rng, kernels)
    first = draw_forward(rng, 0) if rng.random() < 0.6 else draw_generate(rng, 0)
    return Program(setup, (first, *(draw_op(rng, setup) for _ in range(rng.randint(0, 6)))))


def draw_setup(rng: random.Random, kernels: str) -> Setup:
    kinds = ("paged",) * 8 + ("dynamic", "dynamic_config", "static")
    cache = rng.choice(kinds)  # of the library's caches its sdpa is promised, eager or not
    attention = rng.choice(("sdpa", "sdpa", "sdpa", "eager")) if cache == "paged" else "sdpa"
    return Setup(
        model=rng.choice(tuple(MODELS)), cache=cache,
        block=rng.choice((1, 4, 8, 16)), groups=rng.choice(("all", "all", "per_layer", "per_head")),
        prefix=rng.choice(("none", "none", "hash")), workspace=rng.choice((16384, 16384, 8)),
        kernels=kernels, attention=attention, old_name=rng.random() < 0.15,
    )


def draw_op(rng: random.Random, setup: Setup):
    slot = rng.choice((0,) * 7 + (1, 1, BASELINE, NO_CACHE))
    kind = rng.random()
    if kind < 0.5:
        return draw_forward(rng, slot)
    if kind < 0.75:
        return draw_generate(rng, slot)
    slot = slot if slot != NO_CACHE else 0
    return rng.choice((
        Crop(slot, -rng.choice((0, 1, 1, 2, 3, 5, 9, 99))), Crop(slot, -rng.randint(1, 4)),
        Crop(slot, rng.randint(1, 9)), Reorder(slot, rng.randrange(9)), Repeat(slot),
        Reorder(slot, rng.randrange(9)), Reset(slot, finish=True),
        Select(slot, rng.randrange(9), rng.choice(("index", "mask", "negative"))),
        Copy(slot, 1 - slot if slot < BASELINE else BASELINE, rng.choice(("deepcopy", "pickle"))),
        Reset(slot, finish=True), Reset(slot), Switch(rng.choice(("sdpa", "kvlab_paged"))),
    ))  # fmt: skip


def draw_forward(rng: random.Random, slot: int) -> Forward:
    plain = rng.random() < 0.4
    mask = rng.choice(("none", "ones", "left")) if plain else rng.choice(MASKS)
    usual = ("default", "cumsum") if slot != NO_CACHE else ("default", "packed")
    return Forward(
        slot, tokens=rng.choice((1, 1, 1, 2, 3, 5, 8, 13)), rows=rng.choice((1, 2, 2, 3)),
        seed=rng.randrange(4), mask=mask,
        positions=rng.choice(usual) if plain or rng.random() < 0.5 else rng.choice(POSITIONS),
        embeds=rng.random() < 0.12, keep=rng.choice((0, 0, 0, 0, 1, 1, 2, (0,), (-1, 0))),
        hidden=rng.random() < 0.1, attentions=rng.random() < 0.06, labels=rng.random() < 0.1,
        use_cache=rng.choice((None, None, True, False)), grad=rng.random() < 0.08,
    )


def draw_generate(rng: random.Random, slot: int) -> Generate:
    eos = tuple(rng.randrange(1, 64) for _ in range(rng.choice((0, 0, 1, 12, 30))))
    hows = ("greedy",) * 4 + ("sample", "sample", "beams", "beam_sample", "lookup", "assisted")
    hows += ("own", "own")
    how = rng.choice(hows)
    return Generate(
        slot, tokens=rng.choice((1, 2, 4, 7, 12)), seed=rng.randrange(4),
        rows=1 if how in ("lookup", "assisted") else rng.choice((1, 1, 2, 3)),
        mask=rng.choice(("none", "ones", "left", "left", "ended", "holes", "right", "hide_first")),
        new=rng.choice((1, 2, 4, 6)), how=how,
        chunk=rng.choice((None, None, None, 1, 3)), eos=eos, embeds=rng.random() < 0.07,
        hide_ended=rng.random() < 0.5, driver=rng.choice(("eager", "static", "auto")),
        implementation=rng.choice((None, "static")) if slot == NO_CACHE else None,
    )
