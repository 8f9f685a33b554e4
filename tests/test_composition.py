"""The axes compose: pairwise over all of them on a tiny model, and null members change nothing."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from kvlab.blocks import HashSharing, NoSharing
from kvlab.cache import CacheSpec
from kvlab.core import BadInput
from kvlab.format import NAMES, by_name
from kvlab.model import PagedCache, prefill
from kvlab.model.prefill import forward_chunk
from kvlab.offload import HostStore, NoOffload
from kvlab.policy import TriAttention, asked
from kvlab.policy import names as policy_names
from kvlab.retrieval import MeanKey, NoRetrieval, Quest, RandomChoice
from kvlab.summary import Fitted, Merged, MergeMean, NoSummary, RandomTokens
from kvlab.window import NoWindow, SinkWindow

PROMPT, STEPS = 75, 6
# What reads the future of a trace, or what requests say of themselves: a live run has neither.
OFFLINE = {n for n in policy_names() if asked(n).foresees or asked(n).asks}
AXES = {
    "format": NAMES,
    "block_size": (1, 7, 16, 64),
    "policy": tuple(n for n in policy_names() if n not in OFFLINE),
    "window": (NoWindow(), SinkWindow(sinks=4, recent=16)),
    "budget": ({}, {"budget_percent": 60.0}, {"budget_bytes": 1 << 20}, {"budget_blocks": 300}),
    "offload": (NoOffload(), HostStore(slab_tokens=64)),
    "prefix": (NoSharing(), HashSharing(), HashSharing(hold=False)),
    "retrieval": (NoRetrieval(), Quest(64, 0, 0), MeanKey(64, 0, 0), RandomChoice(64, 0, 0)),
    "summary": (NoSummary(), Merged(), Fitted(solver_steps=5), MergeMean(), RandomTokens()),
    "workspace_tokens": (8, 16384),
    "chunk": (5, 32, 75),
}


# No policy knows a format, and no format a policy: which is with which proves nothing.
APART = {("format", "policy")}


def pairwise(axes: dict[str, tuple]) -> list[dict]:
    """Rows in which each pair of values of two axes meets at least once; greedy, repeatable."""
    sizes = {name: len(values) for name, values in axes.items()}
    open_pairs = {
        ((a, i), (b, j))
        for a, b in combinations(axes, 2) if (a, b) not in APART
        for i, j in product(range(sizes[a]), range(sizes[b]))
    }
    rows = []
    while open_pairs:
        row = dict(min(open_pairs))
        for name in axes:
            if name not in row:
                row[name] = max(range(sizes[name]), key=lambda i: gain(row, name, i, open_pairs))
        open_pairs -= pairs(row, axes)
        rows.append(row)
    return [{name: axes[name][i] for name, i in row.items()} for row in rows]


def gain(row, name, index, open_pairs):
    """Open pairs that this value would close with the values chosen already."""
    here = (name, index)
    found = sum(((n, i), here) in open_pairs or (here, (n, i)) in open_pairs
                for n, i in row.items())  # fmt: skip
    return found, -index


def pairs(row, axes):
    return {((a, row[a]), (b, row[b])) for a, b in combinations(axes, 2)}


ROWS = pairwise(AXES)


def label(row) -> str:
    budget = next(iter(row["budget"]), "unbounded")
    return "-".join(map(str, (row["format"], row["block_size"], row["policy"], row["window"].name,
                              row["offload"].name, row["retrieval"].name, budget,
                              row["prefix"].name, row["prefix"].hold, row["summary"].name,
                              row["workspace_tokens"], row["chunk"])))  # fmt: skip


def test_every_pair_is_there():
    for (a, first), (b, second) in combinations(AXES.items(), 2):
        if (a, b) in APART:
            continue
        met = {(repr(row[a]), repr(row[b])) for row in ROWS}
        assert met == {(repr(x), repr(y)) for x, y in product(first, second)}


@pytest.fixture
def model(tiny_model):
    return tiny_model()


@pytest.fixture
def ids():
    return torch.randint(1, 128, (2, PROMPT), generator=torch.Generator().manual_seed(1))


POINT = [[[1.0] * 16] * 4] * 2  # where queries of the tiny model's layers and heads point


def letters(text, add_special_tokens=False):
    """A tokenizer, for what a policy asks the model."""
    return {"input_ids": [ord(c) % 128 for c in text]}


def run(model, ids, cache, chunk):
    """Logits of the last prompt token and of a few decoded ones, [B, 1 + STEPS, V]."""
    logits = [prefill(model, ids, cache, chunk_tokens=chunk).logits[:, None]]
    for token in range(STEPS):
        logits.append(forward_chunk(model, ids[:, token : token + 1], cache))
    return torch.cat(logits, 1)


def spec_of(row) -> CacheSpec:
    axes = {n: row[n] for n in row if n not in ("budget", "chunk")}
    if axes["policy"] == "triattention":
        axes["policy"] = TriAttention(dict.fromkeys(("real", "imaginary", "norm"), POINT))
    return CacheSpec(**axes | row["budget"])


def held(cache) -> int:
    stores = [s for g in cache.groups for s in (g.pool.sealed, g.pool.open, g.pool.apart.store)]
    stores += [g.sources.digests.store for g in cache.groups if cache.spec.retrieval.selects]
    slabs = sum(t.untyped_storage().nbytes() for s in stores for t in s.slabs.values())
    return slabs + sum(g.summaries.nbytes + g.watch.nbytes for g in cache.groups)


def is_refused(row) -> bool:
    """Whether sharing makes no sense with the rest, which does."""
    evicts, window = row["policy"] != "none" and bool(row["budget"]), row["window"].name
    if not row["prefix"].hold:
        return row["prefix"].shares and not evicts
    loses = "budget_percent" in row["budget"] or (evicts and window == "sink")
    return loses or (bool(row["budget"]) and not evicts)


def ranks_tokens_only(policy) -> bool:
    return asked(policy).scored and asked(policy).observes is None


def needs_blocks(row) -> bool:
    """Whether a member of the row needs each token where it was stored."""
    return (row["prefix"].shares or row["offload"].keeps or row["summary"].stands
            or row["retrieval"].selects)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_pairs_of_axes_compose(model, ids, row):
    if ranks_tokens_only(row["policy"]) and needs_blocks(row):
        with pytest.raises(BadInput, match="ranks tokens and no blocks"):
            spec_of(row)
        row = row | {"policy": "fifo"}
    waits = asked(row["policy"]).waits
    if waits and row["budget"] and "budget_percent" not in row["budget"]:
        with pytest.raises(BadInput, match="holds the whole context"):
            spec_of(row)
        row = row | {"budget": {"budget_percent": 60.0}}
    if by_name(row["format"]).sinks > row["block_size"]:
        with pytest.raises(BadInput, match="must lie within a block"):
            PagedCache.for_model(model, spec_of(row), tokenizer=letters)
        row = row | {"format": by_name(row["format"], sinks=0)}  # as the sentence says
    shared, row = row["prefix"], row | {"prefix": NoSharing()}
    idle = row["policy"] == "none" and (
        row["window"].name == "sink" or "budget_percent" in row["budget"] or row["offload"].keeps
        or row["summary"].makes
    )
    if idle or (row["policy"] != "none" and not row["budget"]):
        with pytest.raises(BadInput, match="evict"):
            PagedCache.for_model(model, spec_of(row))  # one of the two would never act
        row = row | {"policy": "fifo" if idle else row["policy"]}
        bound = {"budget_percent": 60.0} if waits else {"budget_blocks": 300}
        row = row | {"budget": row["budget"] or bound}
    if row["summary"].makes and row["offload"].keeps:
        with pytest.raises(BadInput, match="count twice"):
            PagedCache.for_model(model, spec_of(row))
        row = row | {"offload": NoOffload()}
    row = row | {"prefix": shared}
    if row["summary"].makes and shared.shares and shared.hold and not is_refused(row):
        with pytest.raises(BadInput, match="prefix.hold=false"):
            PagedCache.for_model(model, spec_of(row))
        row = row | {"prefix": HashSharing(hold=False)}
    if is_refused(row):
        with pytest.raises(BadInput, match="policy=lru|prefix.hold=false"):
            PagedCache.for_model(model, spec_of(row))
        evicts = row["policy"] != "none" and bool(row["budget"])
        row = row | {"prefix": HashSharing(hold=False) if evicts else HashSharing(),
                     "budget": row["budget"] if evicts else {}}
    cache = PagedCache.for_model(model, spec_of(row), tokenizer=letters)
    logits = run(model, ids, cache, row["chunk"])
    assert torch.isfinite(logits).all()
    cache.check()
    stats = cache.stats()
    assert stats.tokens == 2 * (PROMPT + STEPS)
    assert stats.allocated_bytes == held(cache) >= stats.logical_bytes
    assert stats.resident_tokens <= stats.tokens
    if row["offload"].keeps:
        away = cache.groups[0].away.blocks * row["block_size"]
        assert stats.resident_tokens + away == stats.tokens and bool(away) == bool(stats.host_bytes)
    if not stats.evictions:
        assert stats.resident_tokens == stats.tokens
    if row["prefix"].shares:  # the same request again, on what the first one left
        cache.finish()
        assert torch.isfinite(run(model, ids, cache, row["chunk"])).all()
        cache.check()
    cache.reset()
    cache.check()
    assert held(cache) == 0 == cache.stats().host_bytes


@pytest.mark.parametrize("block_size", AXES["block_size"])
@pytest.mark.parametrize("chunk", AXES["chunk"])
def test_null_members_are_the_plain_model(model, ids, block_size, chunk):
    model.set_attn_implementation("sdpa")
    whole = torch.cat([ids, ids[:, :STEPS]], 1)
    expected = model(whole).logits[:, PROMPT - 1 :]
    cache = PagedCache.for_model(model, format="fp32", block_size=block_size)
    got = run(model, ids, cache, chunk)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_every_format_runs_on_cuda(model, ids, name):
    cache = PagedCache.for_model(model.to("cuda", torch.bfloat16), format=name, block_size=16)
    assert torch.isfinite(run(model, ids.cuda(), cache, 32)).all()
    cache.check()
    cache.reset()
    assert held(cache) == 0
