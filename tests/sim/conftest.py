"""Tiny traces for the tests of the simulator."""

import random

import pytest

from kvlab.sim import from_requests, load_trace


def make_trie(seed: int, requests: int = 9, depth: int = 4, fan: int = 2, block: int = 4):
    """Random walks down a random tree: prefix-chained ids, some partial ends, some repeats."""
    draw = random.Random(seed)
    ids, rows, now = {}, [], 0.0
    for _ in range(requests):
        path, chain = (), []
        for _ in range(draw.randint(1, depth)):
            path += (draw.randrange(fan),)
            chain.append(ids.setdefault(path, len(ids)))
        cut = chain[-1] % 3 == 0  # a property of the id: an equal id is an equal block
        rows.append((now, len(chain) * block - cut, draw.randint(0, 6), chain))
        now += draw.choice([0.0, 1.0, 5.0])
    return from_requests(rows, block, f"trie-{seed}")


def make_trace(*requests: list[int], block: int = 4):
    """Whole blocks, one request a second, no output."""
    rows = [(1000.0 * i, block * len(ids), 0, ids) for i, ids in enumerate(requests)]
    return from_requests(rows, block, "tiny")


@pytest.fixture(scope="session")
def trie():
    return make_trie


@pytest.fixture(scope="session")
def tiny():
    return make_trace


@pytest.fixture(scope="session")
def conversation():
    return load_trace("conversation")


@pytest.fixture(scope="session")
def synthetic():
    return load_trace("synthetic")
