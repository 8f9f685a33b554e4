"""Each access on its own, bound to the verbs `p` of a policy: the compiled form of `sim.flat`."""

from __future__ import annotations

from kvlab.sim.compiled import verbs as p  # those of a policy are given by `bind`
from kvlab.sim.compiled.blocks import free, seal
from kvlab.sim.compiled.state import CAPACITY, CONTENT, HELD, NOW, WHERE
from kvlab.sim.outcome import HIT, MISS


def replay(s, ids, code, gone, gone_at):
    """Replay accesses; how many blocks left, `gone` [E] the contents and `gone_at` [E] when."""
    left = 0
    for access in range(len(ids)):
        content = ids[access]
        s.book[NOW] += 1
        x = s.content[content, WHERE]
        if x:
            code[access] = HIT
            p.touch(s, x, access)
            continue
        code[access] = MISS
        if s.book[HELD] == s.book[CAPACITY]:
            if p.EXPECTS:
                p.expect(s, content)
            x = p.pop(s)
            gone[left], gone_at[left] = s.meta[x, CONTENT], access
            left += 1
            free(s, x)
        p.add(s, seal(s, content, 0, 0), access)
    return left
