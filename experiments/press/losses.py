"""KL of the next tokens, question-agnostic: kvlab's methods, and kvpress's on the same tokens.

    python experiments/press/losses.py MODEL --out ROWS.jsonl --env ENV      # all methods
    python experiments/press/losses.py MODEL snapkv 'kvzip + adakv {"floor": 0.0}'

A context is prefilled in one chunk and compressed; the next tokens, in one step, are compared with
those over the full cache of the same library: mean KL in nats over tokens and books, `held` beside
it. MODEL is a checkpoint folder or, without kvpress, a GGUF file. An arm is a method of
`methods.py` at each granularity, or else a policy, its settings as JSON where it has some, and a
budget behind a plus, each head's own tokens. `table.py` reads the rows.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from methods import GRAINS, METHODS, pressed, spec_of
from torch import Tensor

from kvlab import PagedCache, axes, prefill
from kvlab.cache import CacheSpec
from kvlab.eval.data import BOOKS
from kvlab.model.load import FolderModel
from kvlab.window import SinkWindow

BEGIN = 20_000  # characters of a book that are left out


def books(tokenizer, count: int, tokens: int) -> Iterator[Tensor]:
    """Tokens [1, T] of the first `count` bundled books."""
    with lzma.open(BOOKS, "rt") as lines:
        for line, _ in zip(lines, range(count)):
            text = json.loads(line)["text"][BEGIN : BEGIN + 10 * tokens]
            yield tokenizer(text, return_tensors="pt").input_ids[:, :tokens]


def member(axis: str, told: str) -> object:
    """`kvzip` or `adakv {"floor": 0.0}`."""
    name, _, settings = told.strip().partition(" ")
    return axes.by_name(axis, name, **json.loads(settings or "{}"))


def logs(loaded, spec: CacheSpec, ids: Tensor, context: int) -> tuple[Tensor, float]:
    """Log probabilities [T, V] of what follows the context, and the share of tokens held, %."""
    cache = PagedCache.for_model(loaded.model, spec, tokenizer=loaded.tokenizer)
    ids = ids.to(loaded.model.device)
    prefill(loaded.model, ids[:, :context], cache, chunk_tokens=context)
    held = cache.stats().resident_tokens_percent
    at = torch.arange(context, ids.shape[1], device=ids.device)[None]
    out = loaded.model(ids[:, context:], past_key_values=cache, position_ids=at)
    return out.logits[0].log_softmax(-1), held


def specs(arm: str, kept: float, given) -> Iterator[tuple[str, CacheSpec]]:
    """Granularities of an arm and the caches that have them; kept: a share."""
    more = {"format": "fp32", "kernels": given.kernels}
    if arm in METHODS:
        for grain in given.grains:
            spec = spec_of(arm, grain, kept, given.context, **more)
            if spec is not None:
                yield grain, spec
        return
    policy, _, budget = arm.partition("+")
    yield "head, 4+64", CacheSpec(
        policy=member("policy", policy), block_size=1, evict="token", groups="per_head",
        budget=member("budget", budget or "equal"), budget_percent=100 * kept,
        window=SinkWindow(4, given.recent), **more,
    )


def ours(loaded, texts: list[Tensor], given) -> Iterator[dict]:
    """A row for each arm, share and granularity; one that fails has its reason."""
    full = [logs(loaded, CacheSpec(format="fp32", kernels=given.kernels), ids, given.context)[0]
            for ids in texts]
    for arm in given.arms:
        for kept in given.kept:
            for grain, spec in specs(arm, kept / 100, given):
                row = {"who": "kvlab", "method": arm, "kept": kept, "grain": grain}
                try:
                    each = [logs(loaded, spec, ids, given.context) for ids in texts]
                except Exception as error:
                    yield row | {"refused": f"{type(error).__name__}: {error}"}
                    continue
                kl = [(a.exp() * (a - b)).sum(-1).tolist() for a, (b, _) in zip(full, each)]
                yield row | {"kl": kl, "held": sum(share for _, share in each) / len(each)}


def theirs(texts: list[Tensor], given) -> Iterator[dict]:
    """The same of the arms of kvpress that stand beside ours, book by book."""
    items = [{"name": str(n), "context": ids[0, : given.context].tolist(), "questions": [],
              "next": ids[0, given.context :].tolist()} for n, ids in enumerate(texts)]
    arms = {f"{METHODS[m].arm}:{1 - kept / 100:g}": (m, kept)
            for m in given.arms if m in METHODS for kept in given.kept}
    if "kvzip adakv" in given.arms:  # as published: heads of all layers compete
        arms |= {f"kvzip:{1 - kept / 100:g}": ("kvzip", kept) for kept in given.kept}
    found = {}
    for line in pressed(given.env, given.model, items, list(arms), "float32"):
        method, kept = arms[line["arm"]]
        row = {"who": "kvpress", "method": method, "kept": kept, "grain": "head"}
        if "refused" in line:
            yield row | {"refused": line["refused"]}
            continue
        found.setdefault(line["arm"], []).append(line["kl"])
        if len(found[line["arm"]]) == len(texts):
            yield row | {"kl": found[line["arm"]]}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("arms", nargs="*", default=list(METHODS))
    parser.add_argument("--env", type=Path, help="of env.sh; without it, kvlab alone")
    parser.add_argument("--only", choices=["kvlab", "kvpress"], help="one of the two")
    parser.add_argument("--out", type=Path, help="rows are added to this file")
    parser.add_argument("--grains", nargs="+", default=list(GRAINS), choices=list(GRAINS))
    parser.add_argument("--kept", nargs="+", type=float, default=[50, 25, 10], help="percent")
    parser.add_argument("--books", type=int, default=3)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--next", type=int, default=128)
    parser.add_argument("--recent", type=int, default=64)
    parser.add_argument("--kernels", default="torch", help="float32 alike on any device")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    given, began = arguments(), time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = FolderModel(given.model, dtype="float32").load(device)
    texts = list(books(loaded.tokenizer, given.books, given.context + given.next))
    rows = [] if given.only == "kvpress" else [ours(loaded, texts, given)]
    rows += [theirs(texts, given)] if given.env and given.only != "kvlab" else []
    about = {"kind": "losses", "model": loaded.name, "weights": loaded.weights,
             "device": str(device), "context": given.context}
    with given.out.open("a") if given.out else nullcontext() as out:
        for row in (row for some in rows for row in some):
            if out:
                print(json.dumps(about | row), file=out, flush=True)
            kl = [x for each in row.get("kl", []) for x in each]
            told = row.get("refused") or f"{sum(kl) / len(kl):.4f}"
            print(f"{time.monotonic() - began:6.0f} s  {row['who']:8}{row['method']:20}"
                  f"{row['kept']:6g} %  {row['grain']:20} {told}", flush=True)


if __name__ == "__main__":
    main()
