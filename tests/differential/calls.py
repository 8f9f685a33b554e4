"""What the operations of a program do on one side, and what has to be equal afterwards.

`prepare(op, machine)` gives an `Action`, or None where the operation does not apply: `run(side)` on
either side, `compare(want, got)`, and `settle(want)`, the columns that each slot holds then.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.model import decode

from . import compare, masks, programs
from .masks import Columns
from .models import PAD, STATEFUL_ROPE, build

BEAMS = 2


class Action(NamedTuple):
    """`last(want)`: whether nothing can be compared afterwards, lengths included."""

    run: Callable
    compare: Callable = lambda want, got: None
    settle: Callable = lambda want: {}
    last: Callable = lambda want: False


def prepare(op, machine) -> Action | None:
    if isinstance(op, programs.Switch):
        return Action(lambda side: side.switch(op.to))
    known = machine.columns.get(op.slot)
    if isinstance(op, (programs.Forward, programs.Generate)):
        known = Columns.empty(op.rows) if known is None or op.slot < 0 else known
        make = _forward if isinstance(op, programs.Forward) else _generate
        return make(op, machine, known)
    return None if known is None else _OPERATIONS[type(op)](op, machine, known)


# ---- one forward


def _forward(op: programs.Forward, machine, past: Columns) -> Action | None:
    if past.rows * op.tokens == 0 or (op.attentions and machine.setup.attention != "eager"):
        return None  # the library's sdpa has no weights to show
    if op.mask.startswith("bool4d") and machine.setup.attention == "eager":
        return None  # the library adds a bool mask to the scores there
    if op.slot < 0 and op.mask == "short" and machine.setup.attention == "eager":
        return None  # without a cache a mask says how many keys there are: eager and sdpa differ
    plan = masks.plan(op.mask, past, op.tokens, random.Random(op.seed), machine.heads)
    valid, sound = plan.judged(past, machine.windows)
    ids = masks.words(op.seed, past.rows, op.tokens)
    kept = valid[:, _kept(op)]
    inputs = _inputs(op, ids, past, plan, valid)

    def run(side):
        return _run_forward(op, side, ids, inputs, kept)

    def check(want, got):
        compare.forwards(want, got, kept, valid, sound)

    told = plan.flat[:, past.length :]
    placed = masks.placed(op.positions, past, plan)
    return Action(
        run, check,
        lambda want: {op.slot: past.seen_by(plan.flat).then(ids, plan.new, sound, told, placed)},
    )


def _kept(op):
    if isinstance(op.keep, tuple):
        return torch.tensor(op.keep)
    return slice(-op.keep, None) if op.keep else slice(None)


def _inputs(op, ids: Tensor, past: Columns, plan, valid: Tensor) -> dict:
    places = masks.positions(op.positions, past, plan)
    inputs = {"attention_mask": plan.mask, "position_ids": places}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if op.keep:
        inputs["logits_to_keep"] = op.keep if isinstance(op.keep, int) else torch.tensor(op.keep)
    elif op.labels:
        after = torch.cat([torch.zeros_like(valid[:, :1]), valid[:, :-1]], 1)
        inputs["labels"] = ids.masked_fill(~after, -100)
    if op.use_cache is not None:
        inputs["use_cache"] = op.use_cache
    if op.hidden:
        inputs["output_hidden_states"] = True
    if op.attentions:
        inputs["output_attentions"] = True
    return inputs


def _run_forward(op, side, ids: Tensor, inputs: dict, kept: Tensor) -> dict:
    inputs = side.with_cache(op.slot, inputs)
    with torch.set_grad_enabled(op.grad):
        embeds = None
        if op.embeds or op.grad:
            embeds = side.model.get_input_embeddings()(ids).detach().requires_grad_(op.grad)
            out = side.model(inputs_embeds=embeds, **inputs)
        else:
            out = side.model(ids, **inputs) if op.seed % 2 else side.model(input_ids=ids, **inputs)
        gradient = _gradient(out.logits, embeds, kept) if op.grad else None
    return {
        "logits": out.logits, "hidden": out.hidden_states or (), "loss": out.loss,
        "attentions": out.attentions or (), "gradient": gradient,
    }


def _gradient(logits: Tensor, embeds: Tensor, kept: Tensor) -> Tensor:
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    if kept.any():
        (logits * weight)[kept].sum().backward()
    return torch.zeros_like(embeds) if embeds.grad is None else embeds.grad


# ---- generate


def _generate(op: programs.Generate, machine, past: Columns) -> Action | None:
    single, beams = op.how in ("lookup", "assisted"), "beam" in op.how
    if past.rows == 0 or (single and past.rows > 1) or ((beams or op.embeds) and past.length):
        return None
    if single and op.embeds and machine.setup.attention == "eager":
        return None  # 5.17 drafts from nothing there, and its eager and sdpa differ on that
    if op.how == "own":
        goes_on = torch.equal(past.told, past.shown) and bool(past.placed.all())
        whole = past.length == machine.reference.length(op.slot)  # beams may leave more behind
        if not (machine.own(op.slot) and goes_on and whole):
            return None
        # our driver hears of new columns only
        kind = "ones" if op.mask in ("none", "hide_first") else op.mask
        stateful = machine.setup.model in STATEFUL_ROPE  # the library's chunks differ there, too
        op = replace(op, eos=(), embeds=False, mask=kind, chunk=None if stateful else op.chunk)
    if op.slot < 0 and op.chunk and machine.setup.attention == "eager":
        return None  # the library's own cache there, of which sdpa is promised
    plan = masks.plan(op.mask, past, op.tokens, random.Random(op.seed), machine.heads)
    ids = torch.cat([past.ids, masks.words(op.seed, past.rows, op.tokens)], 1)
    flat = plan.flat
    if op.mask == "none" and not op.embeds:
        flat = ids != PAD  # what the library makes of it
    # chunks of the library begin anew on a filled cache before 5.24; ours go on
    options = _options(replace(op, chunk=None) if op.how == "own" else op, plan.mask, ids)
    prompt = 0 if op.embeds else ids.shape[1]

    def run(side):
        torch.manual_seed(op.seed)
        inputs = side.with_cache(op.slot, dict(options))
        if op.how == "own" and side.is_subject:
            return _own(op, side, ids, plan.new)
        if op.how == "assisted":
            inputs["assistant_model"] = build("llama", seed=1)
        if op.embeds:
            return side.model.generate(
                inputs_embeds=side.model.get_input_embeddings()(ids), **inputs
            )
        return side.model.generate(ids, **inputs)

    def right(want) -> tuple[Columns, Tensor]:
        return _after(op, past, ids, flat, want, machine)

    def check(want, got):
        compare.generations(want, got, right(want)[1], prompt, beams)

    def settle(want):
        return {op.slot: right(want)[0]} if op.slot >= 0 else {}

    # a row of garbage may end, or not, at any token, and the others go on as long as it does
    return Action(run, check, settle, lambda want: not right(want)[1].all())


def _own(op: programs.Generate, side, ids: Tensor, new: Tensor) -> SimpleNamespace:
    """What kvlab's own driver makes of it, which is told of the new columns only."""
    mask = None if bool(new.all()) and op.seed % 2 else new.long()
    cache = side.with_cache(op.slot, {})[side.name]
    out = decode.generate(
        side.model, ids[:, -op.tokens :], cache, op.new, attention_mask=mask,
        chunk_tokens=op.chunk or 2048, driver=op.driver,
    )
    return SimpleNamespace(sequences=torch.cat([ids, out], 1))


def _options(op: programs.Generate, mask: Tensor | None, ids: Tensor) -> dict:
    options = {
        "max_new_tokens": op.new, "do_sample": "sample" in op.how, "pad_token_id": PAD,
        "return_dict_in_generate": True, "output_scores": True,
        "eos_token_id": list(op.eos) or None, "prefill_chunk_size": op.chunk,
        "attention_mask": mask, "num_beams": BEAMS if "beam" in op.how else None,
        "prompt_lookup_num_tokens": 3 if op.how == "lookup" else None,
        "cache_implementation": op.implementation,
    }
    return {name: value for name, value in options.items() if value is not None}


def _after(op, past: Columns, ids: Tensor, flat: Tensor, want, machine):
    """The columns then, and which rows [B] have a right answer."""
    sequences = torch.cat([ids, want.sequences], 1) if op.embeds else want.sequences
    new = sequences[:, ids.shape[1] :]
    whole = torch.cat([flat, torch.ones(past.rows, new.shape[1], dtype=torch.bool)], 1)
    tokens = whole.shape[1] - past.length
    causal = torch.ones(tokens, whole.shape[1], dtype=torch.bool).tril(past.length)
    sound = masks.soundness(causal & whole[:, None, None], past, machine.windows)
    rows = sound[:, op.tokens - 1 :].all(1)
    ended = torch.isin(new, torch.tensor(op.eos or (-1,))).long().cumsum(1)
    ended = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], 1).bool()
    shown = torch.cat([whole[:, past.length : ids.shape[1]], ~(ended & op.hide_ended)], 1)
    length = machine.reference.length(op.slot)
    # behind padding in the last column the library counts on from the padding's position
    placed = flat[:, -1:].expand(-1, tokens)
    told = whole[:, past.length :]
    after = past.seen_by(flat).then(sequences[:, past.length :], shown, sound, told, placed)
    after = masks.blurred(after, ~rows)
    times = BEAMS if "beam" in op.how else 1  # whose tokens they are is the library's secret
    return masks.cropped(after.map(lambda x: x.repeat_interleave(times, 0)), length), rows


# ---- operations on a cache


def _crop(op, machine, past):
    def settle(want):
        return {op.slot: masks.cropped(past, machine.reference.length(op.slot))}

    return Action(lambda side: side.caches[op.slot].crop(op.tokens), settle=settle)


def _moved(slot: int, past: Columns, name: str, argument, index: Tensor) -> Action:
    def run(side):
        getattr(side.caches[slot], name)(argument)

    return Action(run, settle=lambda _: {slot: past.map(lambda x: x[index])})


def _reorder(op, machine, past):
    rng = random.Random(op.seed)
    index = torch.tensor([rng.randrange(past.rows) for _ in range(past.rows)])
    return _moved(op.slot, past, "reorder_cache", index, index) if past.length else None


def _repeat(op, machine, past):
    if past.rows * op.times > 6 or not past.length:
        return None
    index = torch.arange(past.rows).repeat_interleave(op.times)
    return _moved(op.slot, past, "batch_repeat_interleave", op.times, index)


def _select(op, machine, past):
    rng = random.Random(op.seed)
    index = torch.tensor([rng.randrange(past.rows) for _ in range(rng.randint(1, past.rows + 1))])
    if op.how == "negative":
        index = index - past.rows
    elif op.how == "mask":
        index = torch.isin(torch.arange(past.rows), index)
    return _moved(op.slot, past, "batch_select_indices", index, index) if past.length else None


def _copy(op, machine, past):
    def run(side):
        clone = copy.deepcopy if op.how == "deepcopy" else lambda c: pickle.loads(pickle.dumps(c))
        side.caches[op.to] = clone(side.caches[op.slot])

    return Action(run, settle=lambda _: {op.to: past})


def _reset(op, machine, past):
    return Action(lambda side: side.forget(op.slot, op.finish), settle=lambda _: {op.slot: None})


_OPERATIONS = {
    programs.Crop: _crop, programs.Reorder: _reorder, programs.Repeat: _repeat,
    programs.Select: _select, programs.Copy: _copy, programs.Reset: _reset,
}  # fmt: skip
