"""Job: the live cache and the simulator make the same decisions, or here is the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from kvlab import axes
from kvlab.blocks import HashSharing
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Measurement
from kvlab.eval.recording import (
    Decision,
    Recording,
    Simulated,
    agreement,
    differing,
    foresees,
    record,
    record_text,
    replayed,
    simulated,
)
from kvlab.eval.sweep import Point, Sweep
from kvlab.policy import asked, names
from kvlab.serve import Limits

SHOWN = 20  # differing decisions that are printed


class Parity(Sweep):
    """Every policy live under block pressure, then replayed, then simulated.

    model, requests, data: a loader, a source of requests, a source of documents.
    spec: the cache; its policy and its sharing of prefixes are this job's to choose.
    policies: judged on requests with shared prefixes, one at a time; the simulator sees nothing
        but the requests. Null: all that need no attention.
    text_policies: judged on one text of `text_tokens` in a cache of `text_blocks`, whose attention
        they hear; only the recorded events can be replayed. Null: all that need no future.
    batch: sequences at a time in a third run, with preemption and `batch_output_tokens` for each
        request, replayed from its events, for `batch_policies` (null: as `policies`).
    """

    holds_nothing = True
    own_list = "parity takes its policies from job.policies"

    def __init__(
        self, model, requests, data, spec: CacheSpec, policies: Sequence[str] | None = None,
        text_policies: Sequence[str] | None = None, text_tokens: int = 24576,
        text_blocks: int = 64, chunk_tokens: int = 128, batch: int = 4,
        batch_policies: Sequence[str] | None = None, batch_output_tokens: int = 8,
        device: str = "auto",
    ):
        self.policies = chosen("policies", policies, is_served)
        self.batch_policies = chosen(
            "batch_policies", policies if batch_policies is None else batch_policies, is_served
        )
        self.text_policies = chosen("text_policies", text_policies, is_read)
        if spec.budget_blocks is None:
            raise BadInput("cache.budget_blocks", None, "parity needs a budget that is too small")
        if self.text_policies and text_blocks * spec.block_size < 2 * chunk_tokens:
            least = -(-2 * chunk_tokens // spec.block_size)
            raise BadInput("job.text_blocks", text_blocks,
                           f"must hold two chunks of {chunk_tokens} tokens: at least {least}")
        self.model, self.requests, self.data, self.spec = model, requests, data, spec
        self.text_tokens, self.text_blocks, self.batch = text_tokens, text_blocks, batch
        self.batch_output_tokens = batch_output_tokens
        self.chunk_tokens, self.device = chunk_tokens, device

    def points(self, device: torch.device, variants) -> Iterator[Point]:
        """Prints the decisions that differ; nothing is printed under a policy that agrees."""
        loaded = self.model.load(device)
        requests = self.requests.make(loaded.tokenizer, loaded.model.config.vocab_size)
        more = self.batch_output_tokens
        crowd = [r._replace(arrival_ms=0.0, output_tokens=more) for r in requests]
        serving = replace(self.spec, prefix=prompts_only(), policy="lru")
        for scene, policies, run in (
            ("requests", self.policies, lambda p: record(loaded, serving, requests, p)),
            ("batch", self.batch_policies, lambda p: record(
                loaded, serving, crowd, p, Limits(running=self.batch, reserve=False))),
            ("text", self.text_policies, self._reader(loaded)),
        ):  # fmt: skip
            for policy in policies:
                size = self.text_tokens if scene == "text" else len(requests)
                params = {"scene": scene, "policy": policy, **loaded.about(), "size": size}
                yield Point(policy, params, partial(self._judge, scene, policy, policies, run))

    def _judge(self, scene: str, policy: str, policies: list[str], run) -> list[Measurement]:
        rows, found = judged(run(policy), policies, scene == "requests")
        show(scene, policy, found)
        return rows

    def _reader(self, loaded):
        """Policy -> recording of one text."""
        spec = replace(self.spec, prefix="none", budget_blocks=self.text_blocks)

        def read(policy: str) -> Recording:
            [document] = self.data.documents(loaded.tokenizer, 1, self.text_tokens)
            ids = torch.from_numpy(np.asarray(document.ids)).long().to(loaded.model.device)
            return record_text(loaded, spec, ids, policy, self.chunk_tokens)

        return read


def is_served(policy) -> bool:
    """Whether a policy is something without attention, which a server's cache does not watch."""
    return policy.evicts and not policy.scored and not policy.asks


def is_read(policy) -> bool:
    """Whether a policy chooses blocks of one text, which it is not told ahead."""
    of_tokens = policy.scored and policy.observes is None
    return policy.evicts and not (policy.foresees or policy.asks or of_tokens)


def prompts_only():
    """Sharing as the simulator knows it: outputs are forgotten with their request."""
    return HashSharing(outputs=False)


def chosen(
    key: str, given: Sequence[str] | None, fits: Callable[[type], bool]
) -> list[str]:
    """The policies `given` by short name or dotted path, or all known ones that fit this scene."""
    known = [name for name in names() if fits(asked(name))]
    for name in given or ():
        outside = axes.is_outside("policy", name) and fits(asked(name))
        if name not in known and not outside:
            raise BadInput(f"job.{key}", name, f"known here: {', '.join(known)}")
    return known if given is None else list(given)


def judged(
    live: Recording, policies: list[str], simulate: bool
) -> tuple[list[Measurement], list[Decision]]:
    """Rows of one recording, and the decisions in which a second run differs."""
    evictions = live.evictions
    again = replayed(live, live.policy)
    found = [] if again is None else [again]
    rows = [
        Measurement("evictions", evictions, "blocks", count=len(live.events)),
        Measurement("replay_differing_decisions", evictions - again.number if again else 0,
                    "decisions", "lower", count=evictions),
        *disagreement(live, policies),
    ]
    if simulate:
        other = simulated(live)
        found += differing(live.contents(), other.contents)
        rows += counts(live, other)
    return rows, found


def counts(live: Recording, other: Simulated) -> Iterator[Measurement]:
    """Hits, misses and evictions of both; all differences are 0 when they agree."""
    yield from agreement(live, other)
    hits = int(live.hits().sum())
    yield Measurement("hit_difference", abs(hits - other.result.block_hits), "blocks", "lower")
    yield Measurement("eviction_difference", abs(live.evictions - other.result.evictions), "blocks",
                      "lower")


def disagreement(live: Recording, policies: list[str]) -> Iterator[Measurement]:
    """How many of the other policies part from this recording, and when the last one does: that
    two runs agree means something only where the policies do not."""
    others = [p for p in policies if p != live.policy and (live.names or not foresees(p))]
    if not others:
        return
    parted = [d.number for d in (replayed(live, other) for other in others) if d is not None]
    yield Measurement("policies_that_differ", len(parted), "policies", count=len(others))
    if parted:
        yield Measurement("last_to_differ", max(parted), "evictions", count=len(parted))


def show(scene: str, policy: str, found: list[Decision]) -> None:
    for decision in found[:SHOWN]:
        print(f"{scene} {policy}: {decision}")
    if len(found) > SHOWN:
        print(f"{scene} {policy}: ... {len(found) - SHOWN:,} more")
