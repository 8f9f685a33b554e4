"""Sequences that share prefixes come, fork, shrink, fail and go: all is read right, none lost."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from driver import SCALE, Driver, held_bytes, make, oracle
from late import LateStore

from kvlab.blocks import HashSharing
from kvlab.core import KvlabError, OutOfBlocks
from kvlab.offload import HostStore
from kvlab.retrieval import Quest

LOSSY = HashSharing(hold=False)
LIVES = {
    "unbounded": {},
    "lru": {"policy": "lru", "budget_blocks": 24},
    "fifo": {"policy": "fifo", "budget_blocks": 24},
    "prompts only": {"policy": "sieve", "budget_blocks": 24, "prefix": HashSharing(outputs=False)},
    "two tiers": {"policy": "fifo", "budget_blocks": 24, "offload": "host"},
    "write back": {"policy": "fifo", "budget_blocks": 24,
                   "offload": partial(HostStore, mode="write_back", policy="fifo")},
    "write through": {"policy": "lru", "budget_blocks": 24, "groups": "per_layer",
                      "offload": partial(HostStore, mode="write_through")},
    "layer by layer": {"policy": "fifo", "budget_blocks": 24, "offload": LateStore},
    "layer by layer, write through": {"policy": "lru", "budget_blocks": 24,
                                      "offload": partial(LateStore, mode="write_through")},
    "per layer": {"policy": "fifo", "budget_blocks": 24, "groups": "per_layer"},
    "per layer, two tiers": {"policy": "lru", "budget_blocks": 24, "groups": "per_layer",
                             "offload": "host"},
    "lossy": {"policy": "fifo", "budget_blocks": 24, "prefix": LOSSY},
    "lossy share": {"policy": "lru", "budget_percent": 60.0, "prefix": LOSSY},
    "lossy per layer": {"policy": "attention_mass", "budget_blocks": 24, "groups": "per_layer",
                        "prefix": LOSSY},
    "lossy, two tiers": {"policy": "fifo", "budget_blocks": 24, "prefix": LOSSY,
                         "offload": "host"},
}  # fmt: skip


class World:
    """Keys and values follow from the tokens up to their own, as a model's do."""

    def __init__(self, seed: int, **axes):
        made = partial, type
        axes = {name: axis() if isinstance(axis, made) else axis for name, axis in axes.items()}
        self.cache = make(**{"prefix": "hash", "block_size": 3, "head_dim": 4} | axes)
        self.random, self.tokens, self.handles = random.Random(seed), {}, []
        self.made: dict[tuple, torch.Tensor] = {}

    def kv(self, layer: int, tokens: tuple, start: int):
        """k and v [n, H, D] of tokens[start:]."""
        g = self.cache.geometry
        for stop in range(start + 1, len(tokens) + 1):
            key = (layer, tokens[:stop])
            if key not in self.made:
                generator = torch.Generator().manual_seed(hash(key) % (1 << 60))
                self.made[key] = torch.randn(2, g.kv_heads, g.head_dim, generator=generator)
        rows = [self.made[layer, tokens[:stop]] for stop in range(start + 1, len(tokens) + 1)]
        return torch.stack(rows).unbind(1)

    def prompt(self) -> list[int]:
        """One of few beginnings, and an end of its own."""
        head = random.Random(self.random.randrange(3))
        start = [head.randrange(9) for _ in range(self.random.randrange(20))]
        return start + [self.random.randrange(9) for _ in range(self.random.randrange(1, 8))]

    # ---- what can happen

    def open(self):
        prompt = self.prompt()
        reserve = self.random.choice((0, 0, len(prompt), len(prompt) + 5))
        seq = self.cache.open(prompt, reserve=reserve)
        self.tokens[seq] = tuple(prompt[: self.cache.length(seq)])
        assert len(self.tokens[seq]) < len(prompt)
        return seq, prompt

    def serve(self):
        seq, prompt = self.open()
        while len(self.tokens[seq]) < len(prompt):
            rest = prompt[len(self.tokens[seq]) :]
            self.step([seq], [rest[: self.random.randrange(1, 9)]])

    def decode(self):
        seqs = [s for s in self.tokens if self.random.random() < 0.7]
        if seqs:
            self.step(seqs, [[self.random.randrange(9)] * (self.random.random() < 0.9) or [1]
                             for _ in seqs])

    def fork(self):
        seq = self.pick()
        self.tokens[self.cache.fork(seq)] = self.tokens[seq]

    def truncate(self):
        seq = self.pick()
        length = self.random.randrange(len(self.tokens[seq]) + 1)
        try:
            self.cache.truncate(seq, length)
        except KvlabError as error:
            assert isinstance(error, OutOfBlocks) or "was evicted" in str(error)
        else:
            self.tokens[seq] = self.tokens[seq][:length]

    def fail(self):
        seq = self.pick()
        self.step([seq], [[self.random.randrange(9) for _ in range(5)]], layers=1)
        self.cache.abort()

    def close(self):
        seq = self.pick()
        self.cache.close(seq)
        del self.tokens[seq]

    def keep(self):
        tokens = self.tokens[self.pick()]
        handle = self.cache.cache_prefix(tokens, pin=self.random.random() < 0.5)
        assert handle.tokens <= len(tokens)
        self.handles.append(handle)

    def attach(self):
        self.handles.append(self.cache.attach_prefix(self.prompt()))

    def release(self):
        if self.handles:
            self.cache.release_prefix(self.handles.pop(self.random.randrange(len(self.handles))))

    def spill(self):
        if self.cache.spec.offload.keeps:
            self.cache.spill_prefixes()

    def pick(self) -> int:
        return self.random.choice(sorted(self.tokens))

    # ---- a step, and what it must read

    def step(self, seqs, new, layers=None):
        cache, g, longest = self.cache, self.cache.geometry, max(map(len, new))
        for seq, ids in zip(seqs, new):
            cache.tell(seq, ids)
        cache.begin(seqs, [len(ids) for ids in new])
        whole = [self.tokens[seq] + tuple(ids) for seq, ids in zip(seqs, new)]
        for layer in range(g.layers if layers is None else layers):
            q = torch.randn(len(seqs), g.query_heads, longest, g.head_dim)
            k, v = (torch.zeros(len(seqs), g.kv_heads, longest, g.head_dim) for _ in range(2))
            for row, (tokens, ids) in enumerate(zip(whole, new)):
                for x, part in zip((k, v), self.kv(layer, tokens, len(tokens) - len(ids))):
                    x[row, :, longest - len(ids) :] = part.transpose(0, 1)
            out = cache.attend(layer, q, k, v, scale=SCALE)
            for row, (seq, tokens, ids) in enumerate(zip(seqs, whole, new)):
                keep = self.readable(seq, layer, len(tokens), len(ids))
                at = longest - len(ids)
                want = oracle(q[row, :, at:], *self.kv(layer, tokens, 0), keep, None)
                got = out[row, at:].transpose(0, 1)
                torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        if layers is None:
            cache.commit()
            self.tokens |= zip(seqs, whole)

    def readable(self, seq, layer, length, count):
        group = self.cache.groups[self.cache.place[layer][0]]
        keep, size = torch.ones(length, dtype=torch.bool), group.block_size
        places = group.away.places(seq, group.tables[seq], (length - count) // size)
        for index, place in enumerate(places):
            if place == -1:
                assert not group.held.sharing.hold, "running sequences keep their blocks"
                keep[index * size : (index + 1) * size] = False
        return keep


def settle(world):
    """Nothing is wrong with the books, and nothing is left when all have gone."""
    for seq in list(world.tokens):
        world.cache.close(seq)
    world.cache.check()
    world.cache.drop_prefixes()
    world.cache.check()
    assert held_bytes(world.cache) == world.cache.stats().host_bytes == 0
    assert world.cache.stats().blocks == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("life", LIVES)
def test_many_lives(life, seed):
    world, happened = World(seed, **LIVES[life]), 0
    alone = [world.serve, world.open, world.attach, world.release, world.spill]
    more = [world.decode, world.decode, world.fork, world.truncate, world.fail, world.close,
            world.close, world.keep]
    for _ in range(160):
        act = world.random.choice(alone + more * bool(world.tokens))
        try:
            act() if len(world.tokens) < 6 or act not in alone else world.close()
            happened += 1
        except OutOfBlocks:
            world.cache.abort()
        world.cache.check()
        for group in world.cache.groups:
            group.held.known.index.check()
    found = "".join(row["codes"] for row in world.cache.audit())
    assert happened > 80
    assert "h" in found or "H" in found or not world.cache.spec.prefix.hold
    settle(world)


@pytest.mark.parametrize("retrieval, known", [("none", 20), ("quest", 12)])
@pytest.mark.parametrize("hold", [True, False])
def test_what_a_token_computed_from_a_choice_is_not_shared(retrieval, known, hold):
    """Chunks read all of the past under retrieval; a single token reads a choice, and what follows
    from that is not what another sequence would compute."""
    member = Quest(budget_tokens=12, sinks=4, recent=4) if retrieval == "quest" else "none"
    cache = make(block_size=4, prefix=HashSharing(hold=hold), policy="lru", budget_blocks=30,
                 retrieval=member)  # fmt: skip
    words, driver = list(range(21)), Driver(cache)
    seq = cache.open(words)
    empty = torch.zeros(0, cache.geometry.kv_heads, cache.geometry.head_dim)
    driver.past[seq] = [(empty, empty)] * cache.geometry.layers
    driver.check_row = lambda *_: None
    driver.step([seq], [12])
    for _ in range(8):
        driver.step([seq], [1])
    cache.close(seq)
    cache.check()
    assert cache.length(cache.open(words)) == known
