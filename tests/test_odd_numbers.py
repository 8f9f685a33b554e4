"""Numbers that are none, or of the wrong size, in Python: one sentence, before anything is built.

The command line has its own table in `test_bad_input.py`.
"""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest

from kvlab import axes
from kvlab.cache import CacheSpec
from kvlab.config.signature import fits
from kvlab.core import BadInput, check_number
from kvlab.serve import BookChats, Limits, TraceRequests
from kvlab.sim import workloads


def test_what_a_number_may_be():
    for value in (1, 7, np.int64(3)):
        check_number("key", value)
    for value in (0, 1.0, nan, True, "1", None, [1]):
        with pytest.raises(BadInput, match="key=.*a whole number, at least 1"):
            check_number("key", value)
    check_number("key", 0.5, 0, 1, whole=False, above=True)
    check_number("key", None, null=True)
    for value in (0, 1.5, inf, -inf, nan):
        with pytest.raises(BadInput, match="a finite number, more than 0 and at most 1"):
            check_number("key", value, 0, 1, whole=False, above=True)


CACHE = [
    ("block_size", (0, 257, 1.5, True, "8", None, nan)), ("workspace_tokens", (0, 1.5, nan, None)),
    ("budget_blocks", (0, 2.5, True, nan, inf, "4")), ("budget_bytes", (0, nan, inf, "x")),
    ("budget_percent", (0, 101, nan, inf, True, "50")), ("window", (None, 3)),
    ("format", (None, 3)), ("summary", (None,)), ("offload", (None,)), ("budget", (None, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("key", "values"), CACHE, ids=[key for key, _ in CACHE])
def test_caches(key, values):
    for value in values:
        with pytest.raises(BadInput, match=key):
            CacheSpec(**{"policy": "lru", key: value})


MEMBERS = {
    ("policy", "attention_mass"): {"half_life": (-1, 0, nan, inf)},
    ("policy", "compactor"): {"sketch": (0,), "piece": (-1, 0), "blend": (nan, -1)},
    ("policy", "lagkv"): {"lag": (0, -1), "sinks": (-1,)},
    ("policy", "rkv"): {"mix": (nan, 2), "alike": (nan, -2)},
    ("policy", "mq"): {"queues": (0, 10**9), "lifetime": (0,), "ghosts": (-1, nan)},
    ("policy", "s3fifo"): {"ghosts": (nan, -1), "promote": (-1,)},
    ("policy", "admit_reuse"): {"ghosts": (nan, -1)},
    ("policy", "hybrid"): {"half_life": (nan, 0), "frequency": (nan, "1"), "cost": (inf,)},
    ("policy", "wa_lru"): {"recency": (nan, inf), "horizon": (nan,)},
    ("summary", "fitted"): {"damping": (nan, 0), "solver_steps": (0,)},
    ("offload", "host"): {"cap_gb": (nan, inf, 0, 1e300), "slab_tokens": (0, 1.5)},
}


@pytest.mark.parametrize(("axis", "name"), MEMBERS, ids="-".join)
def test_members(axis, name):
    for key, values in MEMBERS[axis, name].items():
        for value in values:
            with pytest.raises(BadInput, match=axis):
                axes.by_name(axis, name, **{key: value})


def test_the_command_line_takes_no_nan():
    assert not fits(nan, float) and not fits(nan, float | None) and fits(inf, float)


def test_requests():
    for key, value in (("running", 1.5), ("waiting", -1), ("chunk_tokens", nan), ("tokens", 0),
                       ("failures", -1), ("decode_steps", nan), ("seconds", nan)):  # fmt: skip
        with pytest.raises(BadInput, match=f"limits.{key}"):
            Limits(**{key: value})
    trace = workloads.system_prompts(4, block_size=4)
    for key, value in (("count", 1.5), ("output_tokens", 0), ("output_tokens", -3), ("seed", -1),
                       ("longest", 0)):  # fmt: skip
        with pytest.raises(BadInput, match=f"requests.{key}"):
            TraceRequests(trace, **{key: value})
    for key, value in (("output_tokens", 0), ("rate", 0), ("rate", nan), ("turns", 0)):
        with pytest.raises(BadInput, match=f"requests.{key}"):
            BookChats(None, **{key: value})


WORKLOADS = {
    "system_prompts": ("prompts", "system_tokens", "user_tokens", "output_tokens", "skew"),
    "chats": ("open_chats", "turns", "system_tokens"), "agents": ("agents", "steps", "tool_tokens"),
    "scans": ("documents", "hot", "document_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKLOADS)
def test_generated_traces(name):
    """A rate of 0 divided by it, blocks of no tokens went on without end, others were negative."""
    for key in ("requests", "block_size", "rate", *WORKLOADS[name]):
        for value in (-1, nan) if key in WORKLOADS[name] else (0, -1, nan):
            with pytest.raises(BadInput, match=key):
                getattr(workloads, name)(**{key: value})
