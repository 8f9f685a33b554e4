"""One request on its way, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvlab.core import check_number
from kvlab.model import PagedCache
from kvlab.serve.requests import Request


@dataclass(frozen=True)
class Limits:
    """running: sequences at a time. waiting: requests that may wait; more are refused (None: any).

    chunk_tokens: of prompts, computed in one step; several prompts share it where the cache takes
    them packed. tokens: of prompt and output together; longer requests are refused (None: any).
    reserve: take all blocks a request can need when it is admitted; False takes them as they come
    and preempts when they run out. failures: times that memory may run out under one request
    before it is refused.
    seconds: of a run after which nobody is admitted: who waits or comes is refused (None: none).
    decode_steps: between two such chunks. 1, the default, bounds both waits: a running request
    waits for one chunk, one that came for its turn among chunks. 0: none while a prompt waits,
    which gives first tokens soonest and fills the batch soonest, and lets running requests wait; 4,
    say, evens out the time between tokens, and first tokens come later.
    """

    running: int = 8
    waiting: int | None = None
    chunk_tokens: int = 512
    tokens: int | None = None
    reserve: bool = True
    failures: int = 20
    decode_steps: int = 1
    seconds: float | None = None

    def __post_init__(self):
        for name, least in (("running", 1), ("chunk_tokens", 1), ("failures", 0),
                            ("decode_steps", 0)):
            check_number(f"limits.{name}", getattr(self, name), least)
        check_number("limits.waiting", self.waiting, 0, null=True)
        check_number("limits.tokens", self.tokens, null=True)
        check_number("limits.seconds", self.seconds, 0, whole=False, above=True, null=True)

    def refusal(self, request: Request, waiting: int) -> str:
        """Why a request cannot even wait; empty if it can."""
        tokens = len(request.prompt) + request.output_tokens
        if not len(request.prompt):
            return f"request {request.number}: the prompt is empty"
        if request.output_tokens < 1:
            return f"request {request.number}: {request.output_tokens} tokens of output, at least 1"
        if self.tokens is not None and tokens > self.tokens:
            return f"request {request.number}: {tokens} tokens, the limit is {self.tokens}"
        if self.waiting is not None and waiting >= self.waiting:
            return f"request {request.number}: {waiting} requests wait already, the limit is that"
        return ""


class Served(NamedTuple):
    """state: "done", "cancelled" or "refused" with a `reason`; times in ms of the run's clock.

    output: tokens generated; token_ms: when each of them was known. hit_tokens: of the prompt,
    found at the first admission; codes: of its blocks
    (`kvlab.cache.audit.REASONS`). first_ms, admitted_ms are None if it never came to that.
    """

    number: int
    state: str
    reason: str
    output: list[int]
    prompt_tokens: int
    hit_tokens: int
    codes: str
    preemptions: int
    arrival_ms: float
    admitted_ms: float | None
    first_ms: float | None
    end_ms: float
    token_ms: tuple[float, ...] = ()

    @property
    def ttft_ms(self) -> float | None:
        """From arrival to the first token."""
        return None if self.first_ms is None else self.first_ms - self.arrival_ms

    @property
    def prefill_ms(self) -> float | None:
        """From the first admission to the first token: without the wait before."""
        return None if self.first_ms is None else self.first_ms - self.admitted_ms


class Job:
    """A request with its sequence. tokens: prompt and output, as far as the host knows them;
    `coming` more are chosen and on their way. computed: of all of them, those that are cached."""

    def __init__(self, request: Request):
        self.request = request
        self.tokens: list[int] = request.prompt.tolist()
        self.seq: int | None = None
        self.ready = False  # one token is chosen and not computed yet: decode goes on from there
        self.computed = self.coming = self.preemptions = self.failures = 0
        self.hit_tokens, self.codes = 0, ""
        self.admitted_ms: float | None = None
        self.first_ms: float | None = None
        self.token_ms: list[float] = []

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def most_tokens(self) -> int:
        """Tokens that will be cached in the end: the last one is never computed."""
        return len(self.request.prompt) + self.request.output_tokens - 1

    @property
    def wanted(self) -> int:
        """Output tokens still to be chosen."""
        total = len(self.request.prompt) + self.request.output_tokens
        return total - len(self.tokens) - self.coming

    @property
    def prefilling(self) -> bool:
        """Whether there are tokens to compute before the next one can be chosen: the prompt, and
        after a preemption also what was generated before it."""
        return not self.ready and self.computed < len(self.tokens)

    @property
    def left(self) -> bool:
        """Whether the user has gone, or will when the tokens arrive that are on their way."""
        after = self.request.cancel_after
        if after is None or len(self.output) + self.coming < after:
            return False
        return after < 0 or self.admitted_ms is not None

    def open(self, cache: PagedCache, reserve: bool, now_ms: float) -> None:
        """Take a place in the cache, with what it holds of these tokens. Raises `OutOfBlocks`."""
        r, most = self.request, self.most_tokens if reserve else 0
        self.seq = cache.open(self.tokens, reserve=most, session=r.session, tool=r.tool)
        self.computed, self.ready = cache.length(self.seq), False
        if self.admitted_ms is None:
            self.admitted_ms, self.hit_tokens = now_ms, self.computed
            self.codes = cache.audits[self.seq].codes if self.seq in cache.audits else ""

    def close(self, cache: PagedCache) -> None:
        cache.close(self.seq)
        self.seq, self.computed = None, 0

    def ends_with(self, count: int) -> bool:
        """Whether so many more tokens are all there is to compute before one is chosen."""
        return self.computed + count == len(self.tokens)

    def choose(self, computed: int) -> None:
        """The model computes so many more tokens and chooses the next one."""
        self.computed += computed
        self.coming += 1
        self.ready = True

    def take(self, token: int, now_ms: float) -> None:
        """A token that was chosen is known."""
        self.tokens.append(token)
        self.token_ms.append(now_ms)
        self.coming -= 1

    def served(self, state: str, reason: str, now_ms: float) -> Served:
        r = self.request
        return Served(
            r.number, state, reason, self.output, len(r.prompt), self.hit_tokens, self.codes,
            self.preemptions, r.arrival_ms, self.admitted_ms, self.first_ms, now_ms,
            tuple(self.token_ms),
        )
