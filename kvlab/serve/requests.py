"""Requests to drive a live cache with: made of traces, or of books, always the same for a seed."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np

from kvlab.core import BadInput, check_number
from kvlab.kinds import describe, fits, shown
from kvlab.sim import Trace, from_requests


class Request(NamedTuple):
    """What somebody asks. prompt: token ids int64 [T]; arrival_ms counts from the start.

    cancel_after: output tokens after which the user leaves (0: while the prompt is computed, -1:
    while waiting), or None. session, tool: see `Requests.open` of the cache.
    """

    number: int
    arrival_ms: float
    prompt: np.ndarray
    output_tokens: int
    cancel_after: int | None = None
    session: int | None = None
    tool: bool | None = None


def check_requests(requests: Sequence[Request]) -> None:
    """Raises `BadInput` for requests that could not be told apart, or that never come."""
    counts = Counter(r.number for r in requests)
    twice = [number for number, count in counts.items() if count > 1]
    if twice:
        raise BadInput("requests", f"number {twice[0]} twice", "each has a number of its own")
    for r in requests:
        p = r.prompt
        if not isinstance(p, np.ndarray) or p.ndim != 1 or p.dtype.kind not in "iu":
            raise BadInput("requests", f"prompt={shown(p)} of number {r.number}",
                           "must be token ids in a NumPy array of whole numbers [T]")
        for field, kind in (("output_tokens", int), ("cancel_after", int | None)):
            if not fits(getattr(r, field), kind):
                raise BadInput("requests", f"{field}={shown(getattr(r, field))} of number "
                               f"{r.number}", f"must be {describe(kind)}")
    late = [r for r in requests if not fits(r.arrival_ms, float) or not isfinite(r.arrival_ms)]
    if late:
        raise BadInput("requests", f"arrival_ms={late[0].arrival_ms} of number {late[0].number}",
                       "must be a finite number")


SAID = ("session", "tool")  # columns of a trace that a request says


class TraceRequests:
    """The first requests of a trace, scaled to a model: equal blocks become equal tokens.

    trace: as `kvlab.sim.load_trace` gives it, or one of `kvlab.sim.workloads`.
    count: requests taken, after `skip`. block_tokens: tokens that a whole block of the trace
    becomes; prompts and outputs shrink or grow alike. Tokens are drawn from the block's id, so the
    text means nothing and prefixes are shared exactly as in the trace.
    longest: blocks; longer requests are left out. output_tokens: instead of the trace's own.
    """

    def __init__(
        self, trace: Trace | Sequence[Trace], count: int = 500, block_tokens: int = 16,
        skip: int = 0, longest: int | None = None, output_tokens: int | None = None, seed: int = 0,
    ):
        for name, value, least in (("count", count, 1), ("block_tokens", block_tokens, 1),
                                   ("skip", skip, 0), ("seed", seed, 0)):
            check_number(f"requests.{name}", value, least)
        check_number("requests.longest", longest, null=True)
        check_number("requests.output_tokens", output_tokens, null=True)
        self.trace = trace if isinstance(trace, Trace) else one(trace)
        self.count, self.block_tokens, self.skip = count, block_tokens, skip
        self.longest, self.output_tokens, self.seed = longest, output_tokens, seed
        self.name = self.trace.name

    def make(self, tokenizer, vocabulary: int) -> list[Request]:
        """The requests; `tokenizer` is not asked, ids lie below `vocabulary`."""
        t, scale = self.trace, self.block_tokens / self.trace.block_size
        made: list[Request] = []
        fresh = int(t.ids.max(initial=-1)) + 1
        for at, ids in enumerate(t.requests()):
            if at < self.skip or (self.longest is not None and len(ids) > self.longest):
                continue
            tokens = max(1, round(int(t.input_tokens[at]) * scale))
            blocks = [self._tokens(i, vocabulary) for i in ids]
            if t.whole_blocks:  # the rest of the prompt has no id: nobody shares it
                blocks.append(self._tokens(fresh + at, vocabulary))
            prompt = np.concatenate(blocks)[:tokens]
            output = self.output_tokens or max(1, round(int(t.output_tokens[at]) * scale))
            told = {name: int(t.columns[name][at]) for name in SAID if name in t.columns}
            told = {name: None if value < 0 else value for name, value in told.items()}
            made.append(Request(len(made), float(t.arrival_ms[at]), prompt, output, **told))
            if len(made) == self.count:
                break
        if not made:
            raise BadInput("requests.skip", self.skip, f"trace {t.name} has no request behind it")
        return made

    def _tokens(self, block: int, vocabulary: int) -> np.ndarray:
        """The tokens of a block id; a partial block takes the first of them."""
        drawn = np.random.default_rng([self.seed, block])
        return drawn.integers(1, vocabulary, self.block_tokens)


QUESTIONS = (
    "Question: What does the text say about {}?\nAnswer:",
    "Question: Find the sentence that names {}.\nAnswer:",
    "Question: In which words is {} mentioned?\nAnswer:",
    "Question: Quote what is told of {}.\nAnswer:",
)


class BookChats:
    """Multi-turn questions about passages of books: real text, real shared prefixes.

    data: documents. Each passage of `passage_tokens` is the beginning of several chats. At any time
    `open_chats` take turns at random; each turn's prompt holds all turns before, with the sentence
    asked for as the answer given. A chat ends after about `turns` turns.
    rate: arrivals a second, a Poisson process. output_tokens: generated for each request.
    """

    name = "book_chats"

    def __init__(
        self, data, count: int = 200, passages: int = 12, passage_tokens: int = 512,
        open_chats: int = 6, turns: int = 4, output_tokens: int = 8, rate: float = 2.0,
        seed: int = 0,
    ):
        for name, value in (("count", count), ("passages", passages), ("turns", turns),
                            ("passage_tokens", passage_tokens), ("open_chats", open_chats),
                            ("output_tokens", output_tokens)):
            check_number(f"requests.{name}", value)
        check_number("requests.rate", rate, 0, whole=False, above=True)
        self.data, self.count, self.passages = data, count, passages
        self.passage_tokens, self.open_chats, self.turns = passage_tokens, open_chats, turns
        self.output_tokens, self.rate, self.seed = output_tokens, rate, seed

    def make(self, tokenizer, vocabulary: int) -> list[Request]:
        """The requests, in the tokens of `tokenizer`."""
        draw, now = random.Random(self.seed), 0.0
        texts = self._texts(tokenizer)
        chats = [Chat(draw, texts) for _ in range(self.open_chats)]
        made: list[Request] = []
        for number in range(self.count):
            slot = draw.randrange(self.open_chats)
            ids = tokenizer(chats[slot].ask(), verbose=False)["input_ids"]
            made.append(Request(number, now, np.asarray(ids, dtype=np.int64), self.output_tokens))
            now += 1e3 * draw.expovariate(self.rate)
            if draw.random() < 1.0 / self.turns:
                chats[slot] = Chat(draw, texts)
        return made

    def _texts(self, tokenizer) -> list[str]:
        """Passages, taken from all documents in turn."""
        documents = self.data.documents(tokenizer, None, self.passage_tokens)
        each = -(-self.passages // len(documents))
        longer = self.data.documents(tokenizer, None, each * self.passage_tokens)
        pieces = [
            tokenizer.decode(d.ids[i * self.passage_tokens : (i + 1) * self.passage_tokens])
            for i in range(each) for d in longer
        ]  # fmt: skip
        if len(pieces) < self.passages:
            raise BadInput("requests.passages", self.passages, f"the data holds {len(pieces)}")
        return pieces[: self.passages]


class Chat:
    """One chat about one passage; the first passages are the more popular ones."""

    def __init__(self, draw: random.Random, texts: list[str]):
        self.draw = draw
        popularity = [1 / (rank + 1) for rank in range(len(texts))]
        self.text = draw.choices(texts, popularity)[0]
        self.sentences = [s for s in re.split(r"(?<=[.!?])\s+", self.text) if len(s) > 20]

    def ask(self) -> str:
        """The next prompt; what it asks for is answered in the one after it."""
        sentence = self.draw.choice(self.sentences or [self.text])
        words = [w.strip('.,;:!?"()-') for w in sentence.split()]
        word = self.draw.choice([w for w in words if len(w) > 3] or words)
        prompt = f"{self.text}\n\n{self.draw.choice(QUESTIONS).format(word)}"
        self.text = f"{prompt} {sentence}"
        return prompt


def several(requests: Sequence) -> list:
    """Sources of requests, one after the other."""
    return list(requests)


def one(traces: Sequence[Trace]) -> Trace:
    if len(traces) != 1:
        raise BadInput("trace", [t.name for t in traces], "name one trace for live requests")
    return traces[0]


def with_rate(requests: Sequence[Request], per_second: float) -> list[Request]:
    """The same requests in the same order, arriving `per_second` on average."""
    last = max(1e-9, requests[-1].arrival_ms - requests[0].arrival_ms)
    factor = 1e3 * len(requests) / per_second / last
    first = requests[0].arrival_ms
    return [r._replace(arrival_ms=(r.arrival_ms - first) * factor) for r in requests]


def with_cancellations(requests: Sequence[Request], share: float, seed: int = 0) -> list[Request]:
    """A random `share` of the users leaves at a random point of the output, or before it."""
    draw = random.Random(seed)
    return [
        r._replace(cancel_after=draw.randrange(-1, r.output_tokens)) if draw.random() < share else r
        for r in requests
    ]


def as_trace(requests: Sequence[Request], names: Sequence[list[int]], block_size: int) -> Trace:
    """What the simulator sees of `requests` that come one by one, each when the last is done.

    names: the chained hashes of each prompt's whole blocks; partial ends are not shared. The last
    output token is never cached, so it is left out.
    """
    ids: dict[int, int] = {}
    dense = [[ids.setdefault(name, len(ids)) for name in chain] for chain in names]
    rows = [
        (1e3 * i, len(r.prompt), r.output_tokens - 1, dense[i]) for i, r in enumerate(requests)
    ]
    return from_requests(rows, block_size, "requests")
