"""Synthetic request traces, seeded: the same arguments always give the same trace.

Each generator stresses one habit of real traffic. Lengths are in tokens; arrivals are a Poisson
process of `rate` requests a second; block ids are chained over the prefix as in recorded traces.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from kvlab.core import BadInput, check_number
from kvlab.sim.chain import Chain
from kvlab.sim.trace import Trace, from_requests

# A request before ids: the pieces of its prompt as (name, tokens), and the tokens it generates; of
# a session also its number, and whether the answer calls a tool (-1: the workload has none).
Prompt = tuple[list[tuple[object, int]], int] | tuple[list[tuple[object, int]], int, int, int]


def system_prompts(
    requests: int = 2000, *, prompts: int = 200, skew: float = 1.0, system_tokens: int = 4096,
    user_tokens: int = 512, output_tokens: int = 256, block_size: int = 64, rate: float = 2.0,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """Shared system prompts with Zipf popularity (weight 1 / rank**skew), each with a fresh user
    turn of about `user_tokens`."""
    _check(rate, requests=requests, prompts=prompts, block_size=block_size)
    _check_tokens(system_tokens=system_tokens, user_tokens=user_tokens, output_tokens=output_tokens)
    check_number("skew", skew, 0, whole=False)
    draw = random.Random(seed)
    weights = 1.0 / np.arange(1, prompts + 1) ** skew
    ranks = draw.choices(range(prompts), weights=weights.tolist(), k=requests)
    made = (
        ([(("system", rank), system_tokens), (("user", i), _about(draw, user_tokens))],
         _about(draw, output_tokens))
        for i, rank in enumerate(ranks)
    )  # fmt: skip
    return _trace("system_prompts", made, block_size, rate, draw)


def chats(
    requests: int = 2000, *, open_chats: int = 50, turns: int = 6, system_tokens: int = 1024,
    user_tokens: int = 256, output_tokens: int = 384, block_size: int = 64, rate: float = 2.0,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """Multi-turn chats: `open_chats` at a time take turns at random, each turn's prompt holds all
    before; a chat ends after about `turns` turns and a new one takes its place."""
    _check(rate, requests=requests, open_chats=open_chats, turns=turns, block_size=block_size)
    _check_tokens(system_tokens=system_tokens, user_tokens=user_tokens, output_tokens=output_tokens)
    draw = random.Random(seed)

    def turns_of_all() -> Iterator[Prompt]:
        live = [_Chat(i, system_tokens, i) for i in range(open_chats)]
        for i in range(requests):
            slot = draw.randrange(open_chats)
            chat = live[slot]
            answer = _about(draw, output_tokens)
            turn = chat.turn(("user", i), _about(draw, user_tokens), answer)
            yield *turn, chat.session, -1
            if draw.random() < 1.0 / turns:
                live[slot] = _Chat(open_chats + i, system_tokens, open_chats + i)

    return _trace("chats", turns_of_all(), block_size, rate, draw)


def agents(
    requests: int = 2000, *, agents: int = 20, steps: int = 12, system_tokens: int = 6144,
    tool_tokens: int = 1024, output_tokens: int = 128, block_size: int = 64, rate: float = 4.0,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """Agents: `agents` run side by side in turn, each with its own long system prompt; a task is
    `steps` steps, each adding a tool result, then the agent starts over from its prompt. A task is
    a session, and all its answers but the last call a tool."""
    _check(rate, requests=requests, agents=agents, steps=steps, block_size=block_size)
    _check_tokens(system_tokens=system_tokens, tool_tokens=tool_tokens, output_tokens=output_tokens)
    draw = random.Random(seed)

    def all_steps() -> Iterator[Prompt]:
        live = [_Chat(("agent", a), system_tokens, a) for a in range(agents)]
        for i in range(requests):
            a, step = i % agents, i // agents
            if step % steps == 0:
                live[a] = _Chat(("agent", a), system_tokens, step // steps * agents + a)
            lengths = _about(draw, tool_tokens), _about(draw, output_tokens)
            calls = int((step + 1) % steps != 0)
            yield *live[a].turn(("tool", i), *lengths), live[a].session, calls

    return _trace("agents", all_steps(), block_size, rate, draw)


def scans(
    requests: int = 2000, *, documents: int = 40, document_tokens: int = 8192, hot: int = 10,
    hot_share: float = 0.3, user_tokens: int = 64, output_tokens: int = 64, block_size: int = 64,
    rate: float = 2.0, seed: int = 0,
) -> Trace:  # fmt: skip
    """A loop over `documents` long documents, which evicts everything under LRU just before it is
    wanted again, mixed with a `hot_share` of requests to `hot` popular ones."""
    if not 0 <= hot_share <= 1:
        raise BadInput("hot_share", hot_share, "must lie between 0 and 1")
    _check(rate, requests=requests, documents=documents, hot=hot, block_size=block_size)
    _check_tokens(document_tokens=document_tokens, user_tokens=user_tokens,
                  output_tokens=output_tokens)  # fmt: skip
    draw = random.Random(seed)

    def mixed() -> Iterator[Prompt]:
        at = 0
        for i in range(requests):
            if draw.random() < hot_share:
                name = ("hot", draw.randrange(hot))
            else:
                name, at = ("scan", at % documents), at + 1
            question = (("user", i), _about(draw, user_tokens))
            yield [(name, document_tokens), question], _about(draw, output_tokens)

    return _trace("scans", mixed(), block_size, rate, draw)


def _check(rate: float, **counts: int) -> None:
    """Raises `BadInput` for a rate that is none, and for counts below 1."""
    check_number("rate", rate, 0, whole=False, above=True)
    for name, value in counts.items():
        check_number(name, value)


def _check_tokens(**lengths: int) -> None:
    """Raises `BadInput` for lengths below 0; a part of about 0 tokens has 1."""
    for name, value in lengths.items():
        check_number(name, value, 0)


class _Chat:
    """A conversation whose prompt grows by what was said."""

    def __init__(self, name: object, system_tokens: int, session: int):
        self.session = session
        self.parts: list[tuple[object, int]] = [(("system", name), system_tokens)]

    def turn(self, name: object, user_tokens: int, answer_tokens: int) -> Prompt:
        self.parts.append((name, user_tokens))
        prompt = list(self.parts)
        self.parts.append((("answer", name), answer_tokens))
        return prompt, answer_tokens


def _about(draw: random.Random, mean: int) -> int:
    """A length spread around its mean: half of it to one and a half."""
    return max(1, round(mean * draw.uniform(0.5, 1.5)))


def _trace(
    name: str, prompts: Iterable[Prompt], block_size: int, rate: float, draw: random.Random
) -> Trace:
    ids: dict[tuple, int] = {}
    now, rows, known = 0.0, [], []
    for parts, output, *more in prompts:
        known.append(more or [-1, -1])
        tokens = sum(length for _, length in parts)
        chain = Chain(ids, block_size)
        for piece, length in parts:
            chain.add(piece, length)
        rows.append((round(now, 3), tokens, output, chain.ids()))
        now += 1e3 * draw.expovariate(rate)
    columns = dict(zip(("session", "tool"), np.array(known, dtype=np.int64).reshape(-1, 2).T))
    columns = {key: column for key, column in columns.items() if (column >= 0).any()}
    return replace(from_requests(rows, block_size, name), columns=columns)
