"""Tiny traces for the tests of the simulator."""

import importlib
import random
import sys

import pytest

import kvlab.sim
from kvlab.sim import fast, from_requests, load_trace

ROOM = "kvlab.sim.compiled"


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


@pytest.fixture(scope="session")
def plain_room():
    """A second copy of the compiled room, whose loops are run as the Python that they are written
    in: the modules that `fast` calls, by their names there."""
    from numba import config

    mine = {name: module for name, module in sys.modules.items() if name.startswith(ROOM)}
    for name in mine:
        del sys.modules[name]
    was, config.DISABLE_JIT = config.DISABLE_JIT, 1
    try:
        names = {"catalog": "catalog", "chooser": "chooser", "sums": "sums", "loops": "runner"}
        return {name: importlib.import_module(f"{ROOM}.{of}") for name, of in names.items()}
    finally:
        config.DISABLE_JIT = was
        for name in [name for name in sys.modules if name.startswith(ROOM)]:
            del sys.modules[name]
        sys.modules.update(mine)
        kvlab.sim.compiled = mine[ROOM]


@pytest.fixture
def plain(plain_room, monkeypatch):
    """compiled=True runs loops that nobody compiled: the same logic, without the minute that a
    combination of policies takes to compile."""
    for name, module in plain_room.items():
        monkeypatch.setattr(fast, name, module)
    from numba import config

    monkeypatch.setattr(config, "DISABLE_JIT", 1)  # loops are bound when they are first asked for


@pytest.fixture
def how(request):
    """Says how the loops of a test run."""
    if request.param == "plain":
        request.getfixturevalue("plain")
