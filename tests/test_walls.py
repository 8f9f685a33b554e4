"""No part knows who holds it: objects of kvlab hold one another from above to below.

What stands in the lists has a reason, or is being rebuilt; they only shrink.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_floors import deep, listed
from walls import handed, rings

from kvlab.core import CacheGeometry

ROOT = Path(__file__).resolve().parents[1] / "kvlab"
HANDED = {
    "PagedCache -> PagedLayer",  # transformers hands layers on and asks them for sizes
    "StepCache -> PagedLayer",
    "Sitter -> PagedLayer",
    "TextSummary -> Teller",  # a teller reads its settings; nobody keeps the teller here
    "PrefillSpeed -> Arm",  # and so do the arms of a measurement
    "PrefillSpeed -> PeerArm",
    "PrefixTTFT -> Requests",
    "Drawn -> Kept",  # for one call: what is on disk of a task's items
    "Adaptive -> Choice",  # who leads, by the settings of the policy
    "Line = self in meta.line",  # a linked list, of which an entry leaves without a search
}
RINGS = {
    ("PagedCache", "PagedLayer"),
    ("BlockMeta", "Line"),
}
CACHES = {
    "plain": {},
    "shared": {"prefix": "hash", "policy": "lru", "budget_blocks": 20, "offload": "host"},
    "lossy": {"policy": "fifo", "budget_blocks": 4, "summary": "merged"},
    "away": {"policy": "snapkv", "budget_blocks": 4, "offload": "host", "retrieval": "quest"},
    "layers": {"policy": "attention_mass", "budget_percent": 50, "groups": "per_layer",
               "evict": "block"},
}


def test_who_hands_itself_to_its_parts():
    found = {told for path in ROOT.rglob("*.py") for told in handed(path.read_text())}
    assert found == HANDED


@pytest.mark.parametrize(("line", "told"), [
    ("self.part = Part(self)", ["A -> Part"]),
    ("self.parts = [room.Part(3, owner=self) for _ in x]", ["A -> room.Part"]),
    ("self.part = Part(self.told)", ["A -> Part"]),
    ("self.part = Part(weakref.proxy(self))", ["A -> weakref.proxy"]),
    ("part.owner = self", ["A = self in part.owner"]),
    ("self.part = Part(self.size)", []),
    ("raise BadInput(self)", []),
])  # fmt: skip
def test_who_hands_itself_over_would_be_seen(line, told):
    source = f"class A:\n def told(self): pass\n def __init__(self, part):\n  {line}"
    assert handed(source) == told


@pytest.fixture(scope="module")
def found(request) -> set[tuple[str, ...]]:
    """The rings in caches that have just served a prompt."""
    import torch
    from tiny import make_tiny_model

    from kvlab import PagedCache, prefill

    model, seen = make_tiny_model(), set()
    for axes in CACHES.values():
        cache = PagedCache.for_model(model, format="int8", block_size=16, **axes)
        prefill(model, torch.arange(1, 101)[None], cache, chunk_tokens=48)
        seen |= set(rings(cache))
    return seen


def test_no_object_of_a_live_cache_knows_who_holds_it(found):
    assert found == RINGS


def test_deep_imports_that_are_gone_are_struck_from_the_list():
    assert not sorted(listed() - deep())


class Knows:
    __module__ = CacheGeometry.__module__  # counts as one of ours

    def __init__(self, holder=None):
        self.holder = holder


def test_a_ring_would_be_seen():
    import weakref
    from functools import partial

    for reference in (lambda x: x, weakref.proxy, weakref.ref, lambda x: [{"of": x}],
                      lambda x: lambda: x, lambda x: partial(print, x)):  # fmt: skip
        holder = Knows()
        assert rings(holder) == []
        holder.holder = Knows(reference(holder))
        assert rings(holder) == [("Knows",)]
