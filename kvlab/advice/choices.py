"""The compositions that may be advised, and which of them fit."""

from __future__ import annotations

from typing import NamedTuple

from kvlab import axes
from kvlab.advice.account import Account, account, workspace_bytes
from kvlab.advice.ask import GOALS, Ask
from kvlab.advice.table import BLOCK_SIZE, CHUNK_TOKENS, Loss, formats, measured, partial
from kvlab.cache import CacheSpec
from kvlab.core import CacheGeometry
from kvlab.model import Outline

SPARE = 8  # one part in so many stays free: the allocator's fragments, libraries, captured graphs
SINKS, RECENT = 4, 4092  # of a window
FORGETS = {
    None: "nothing",
    "host": "nothing: what does not fit lies in host memory and is read from there",
    "quest": "nothing, but a decoded token reads 2,048 tokens of it: what none of them scores as "
             "worth reading is missed",
    "prefix": "nothing of a running request; of ended ones what was used longest ago, which is "
              "then computed again",
    "window": f"all but the first {SINKS} and the last {RECENT:,} tokens",
}  # fmt: skip
_DEEDS = {
    None: (),
    "host": ("policy=fifo", "offload=host"),
    "quest": ("retrieval=quest",),
    "prefix": ("prefix=hash", "policy=lru"),
    "window": ("window=sink", "window.middle=false", f"window.sinks={SINKS}",
               f"window.recent={RECENT}"),
}  # fmt: skip


PARTLY = ("quest", "window")  # these lose more than the format does
TOO_MUCH = 5.0  # % of perplexity, at the upper end of its interval: no advice


class Choice(NamedTuple):
    """options: what it is on the command line. deed: what is done beside the format, if anything.

    now, end: bytes of the cache. needed: of the device in all, at the end, with weights, workspace,
    one chunk and the spare part. losses: of the format, measured, one for each model. beside: of
    the window or the choice of blocks in 16 bits, likewise; [] where there is none, or where nobody
    measured it. goal: the first that it serves.
    """

    goal: str
    options: tuple[str, ...]
    deed: str | None
    spec: CacheSpec
    now: Account
    end: Account
    needed: int
    fits: bool
    losses: list[Loss]
    beside: list[Loss]

    @property
    def loses(self) -> bool:
        """Whether the format loses too much on one of the models to be advised."""
        return any(row.perplexity.high > TOO_MUCH for row in self.losses)

    @property
    def forgets(self) -> str:
        """What of the text can be read no more."""
        return FORGETS[self.deed]

    @property
    def known(self) -> bool:
        """Whether all that it loses was measured: of a window and a choice of blocks that is so in
        16 bits at most, for with fewer nobody measured both together."""
        return self.deed not in PARTLY or bool(self.beside) and "format=bf16" in self.options

    @property
    def whole(self) -> list[Loss]:
        """The rows of all that it loses, one for each model; [] where that is not known."""
        if not self.known:
            return []
        return self.beside if self.deed in PARTLY else self.losses

    @property
    def order(self) -> tuple[bool, float]:
        """Choices of a goal by what they lose, on the model that loses most."""
        rows = self.whole or self.losses
        return not self.known, max((row.kl.value for row in rows if row.kl), default=0.0)

    @property
    def name(self) -> str:
        budget = "cache.budget_blocks="
        words = [o.removeprefix("format=") for o in self.options if not o.startswith(budget)]
        return " ".join(words)


def choices(ask: Ask, model: Outline) -> list[Choice]:
    """All that serve the goal, or one of the goals where none is asked for; of each goal what loses
    least comes first."""
    found = []
    for goal in [ask.goal] if ask.goal else GOALS:
        made = [_choice(goal, format, deed, ask, model) for format, deed in _of(goal, ask)]
        found += sorted((choice for choice in made if choice), key=lambda choice: choice.order)
    return found


def dominated(options: tuple[str, ...]) -> bool:
    """Whether another format takes no more bits and loses less, on every model measured."""
    own = measured(options)
    if not all(row.kl for row in own):
        return False
    others = (measured(o) for o in formats() if o != options)
    return any(
        all(b.kl and b.bits <= a.bits and b.kl.value < a.kl.value for a, b in zip(own, other))
        for other in others
    )


def _of(goal: str, ask: Ask) -> list[tuple[tuple[str, ...], str | None]]:
    best = [options for options in formats() if not dominated(options)]
    full = ("format=bf16",)
    lossy = [options for options in best if options != full]
    if goal == "exact":
        return [(full, None), (full, "host")]
    if goal == "facts":
        return [*((options, None) for options in lossy), (full, "quest"),
                *((options, "host") for options in lossy[:2])]  # fmt: skip
    if goal == "chat":
        return [(options, "prefix") for options in _few(best)]
    return [(options, "window") for options in _few(best)] if ask.context > SINKS + RECENT else []


def _few(best: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The full cache, the first format below it, and the first below 5 bits."""
    small = [options for options in best if measured(options)[0].bits < 5]
    return list(dict.fromkeys([*best[:2], *small[:1]]))


def _choice(
    goal: str, format: tuple[str, ...], deed: str | None, ask: Ask, model: Outline
) -> Choice | None:
    options = (*format, *_DEEDS[deed])
    spec = spec_of(options)
    g = CacheGeometry.of(model.portrait.shapes, model.portrait.query_heads, BLOCK_SIZE)
    usable = int(ask.memory_gb * 1e9) * (SPARE - 1) // SPARE
    rest = (model.parameters * 2 + workspace_bytes(spec, g)
            + requests_bytes(ask, model))  # fmt: skip
    whole = account(spec, g, ask.context, ask.requests)
    if deed == "host" and whole.device + rest <= usable:
        return None  # nothing has to leave the device
    if deed in ("host", "prefix"):
        # open blocks, tables and first tokens, with a sealed block of each request
        room = usable - rest - account(spec, g, BLOCK_SIZE + 1, ask.requests).device
        each = ask.context // BLOCK_SIZE if deed == "prefix" else 1  # blocks that must be there
        least = ask.requests * (each + 1)  # with an open one
        slab = account(spec, g, 1024, 1).device - account(spec, g, 0, 1).device
        blocks = max(least, room // slab * (1024 // BLOCK_SIZE))
        options = (*options, f"cache.budget_blocks={blocks}")
        spec = spec_of(options)
    now, end = (account(spec, g, n, ask.requests) for n in (ask.now, ask.context))
    if deed == "prefix":  # what ended requests leave fills the budget
        tokens = max(ask.context, spec.budget_blocks * BLOCK_SIZE // ask.requests)
        end = account(spec, g, tokens, ask.requests)
    needed = (rest + end.device) * SPARE // (SPARE - 1)
    return Choice(goal, options, deed, spec, now, end, needed, end.device + rest <= usable,
                  measured(format), partial(_DEEDS[deed]) if deed in PARTLY else [])


def requests_bytes(ask: Ask, model: Outline) -> int:
    """One chunk of prefill, and a token of each request that decodes meanwhile."""
    return (CHUNK_TOKENS + ask.requests) * model.chunk_token_bytes


def spec_of(options: tuple[str, ...], block_size: int = BLOCK_SIZE) -> CacheSpec:
    """The cache that these words choose. Raises `BadInput` as the cache would."""
    return CacheSpec(**arguments(options), block_size=block_size)


def arguments(options: tuple[str, ...]) -> dict:
    """Arguments of `CacheSpec`: members with their settings, and budgets."""
    named, settings, rest = {}, {}, {}
    for word in options:
        key, _, value = word.partition("=")
        group, _, field = key.partition(".")
        if not field:
            named[group] = value
        elif group == "cache":
            rest[field] = int(value)
        else:
            settings.setdefault(group, {})[field] = _setting(value)
    return {axis: axes.by_name(axis, name, **settings[axis]) if axis in settings else name
            for axis, name in named.items()} | rest  # fmt: skip


def _setting(value: str) -> bool | int | float:
    if value in ("true", "false"):
        return value == "true"
    return float(value) if "." in value else int(value)
