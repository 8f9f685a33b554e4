"""How a loop's forwards run: one after the other, or ahead of the host by a step."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.core import BadInput
from kvlab.model import Fetched, Lanes, LoadedModel, Packed, PagedCache
from kvlab.serve.job import Job
from kvlab.serve.rows import forward_rows


class Now:
    """Tokens that are there."""

    def __init__(self, tokens: list[int]):
        self._tokens = tokens

    def tokens(self) -> list[int]:
        return self._tokens


class Eager:
    """The library's forward, for any cache: chunks of one prompt at a time, every token waited for.

    lag: steps that the host may be behind. packs: whether a chunk may hold several prompts.
    why_eager: why steps are not captured.
    """

    lag, packs = 0, False

    def __init__(self, model, cache: PagedCache, why_eager: str = "as asked for"):
        self.model, self.cache, self.why_eager = model, cache, why_eager

    def warm_up(self, tokens: int) -> None:
        """Nothing is made ahead."""

    def prefill(self, jobs: list[Job], ids: list[list[int]]) -> Now | Fetched:
        """The tokens that follow chunks `ids` of the jobs' prompts."""
        return self._forward(jobs, ids)

    def decode(self, jobs: list[Job]) -> Now | Fetched:
        """The next token of each."""
        return self._forward(jobs, [j.tokens[-1:] for j in jobs])

    def _forward(self, jobs: list[Job], ids: list[list[int]]) -> Now:
        for job, new in zip(jobs, ids):
            self.cache.tell(job.seq, new)
        logits = forward_rows(self.model, self.cache, [j.seq for j in jobs], ids)
        return Now(logits.argmax(-1).tolist())

    def leave(self, job: Job) -> None:
        """A job gives its sequence up."""


class Ahead(Eager):
    """Prompts packed without padding, and captured decode steps over lanes.

    A step reads the tokens that the one before left on the device, so the host launches the next
    one before it has seen them.
    """

    lag, packs = 1, True

    def __init__(self, model, cache: PagedCache, most: int, driver: str):
        self.packed = Packed(model, cache)
        self.lanes = Lanes(model, cache, most, driver=driver, fusing=self.packed.fusing)
        self.cache, self.why_eager = cache, self.lanes.why_eager
        self._next: dict[int, Tensor] = {}  # by sequence, the token that its prompt ends in

    def warm_up(self, tokens: int) -> None:
        self.lanes.warm_up(tokens)

    @torch.inference_mode()
    def prefill(self, jobs, ids):
        tokens = self.packed.forward([j.seq for j in jobs], ids).argmax(-1)
        ends = [i for i, (job, new) in enumerate(zip(jobs, ids)) if job.ends_with(len(new))]
        self._next.update((jobs[i].seq, tokens[i]) for i in ends)
        return Fetched(tokens)

    @torch.inference_mode()
    def decode(self, jobs):
        lanes, wanted = self.lanes, {j.seq: j for j in jobs}
        for seq in [s for s in lanes.seqs if s not in wanted]:
            lanes.leave(seq)
        here = set(lanes.seqs)
        fresh = [seq for seq in wanted if seq not in here]
        if fresh:
            lanes.join(fresh, torch.stack([self._next.pop(seq) for seq in fresh]))
        jobs[:] = [wanted[seq] for seq in lanes.seqs]
        return lanes.step()

    def leave(self, job):
        self._next.pop(job.seq, None)
        if job.seq in self.lanes.seqs:
            self.lanes.leave(job.seq)


def engine(loaded: LoadedModel, cache: PagedCache, most: int, driver: str) -> Eager:
    """`Ahead` where the cache can be filled so, else `Eager`, which says why.

    driver: "eager" for the library's forward; "auto", "graph" and "static" as in `Lanes`.
    """
    why = "as asked for" if driver == "eager" else obstacle(cache)
    if why and driver == "graph":
        raise BadInput("driver", driver, f"{why}; auto runs eagerly then")
    if why:
        return Eager(loaded.model, cache, why)
    return Ahead(loaded.model, cache, most, driver)


def obstacle(cache: PagedCache) -> str | None:
    """Why sequences of `cache` have to be fed through the library's forward."""
    if cache.teller is not None:
        return "this cache has to hear the tokens of every forward"
    if cache.spec.by_token:
        return "tokens that are chosen one by one are chosen in the library's forward"
    return None
