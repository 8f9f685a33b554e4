"""What a compiled policy says and does; a policy writes those that differ from these.

add(s, x, at)     a block was sealed; `at` is the access that wanted it, -1 in a tier behind
touch(s, x, at)   it was used; it may be held
hold, release, remove (s, x); pop(s); expect(s, content); tick(s): as in `policy.base`. pop gives 0
                  and changes nothing where nothing is evictable. STATE is 0 when a block is added.
admit(s, x, at, hits)  where COUNTS: `add` of a block that was used before the policy knew it
begin(s, moments, request)  a request comes: row `request` of `moments` (see `moments`)
expired(s)        where EXPIRES: the next block whose time is over, forgotten here; 0: no more

prepare(state, policy)  plain Python: the policy's parameters, from the object, into an empty state
MARKED: pins leave a mark.
EXPECTS: it listens to `expect`. ORDER: it uses the arrays of `order`. EARLY: a block may be held
before it is added, which spares the work of taking it out again. EVICTS: it ever gives blocks up.
WIDTH: columns of `content`. ROWS: more rows of `node` than blocks, as (a block, in all). NOTES:
numbers in `notes`. DOOR_WIDTH: columns of `content` of its door, 0 where it has none.
"""

from __future__ import annotations

from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import CHILDREN

MARKED = EXPECTS = ORDER = EARLY = EXPIRES = COUNTS = False
EVICTS = True
WIDTH, ROWS, NOTES, DOOR_WIDTH = CHILDREN, (0, 0), 0, 0
SAYS = "MARKED", "EXPECTS", "ORDER", "EVICTS", "COUNTS", "WIDTH", "ROWS", "NOTES"
SAYS += ("DOOR_WIDTH",)


def prepare(state, policy):
    pass


@verb
def add(s, x, at):
    pass


@verb
def hold(s, x):
    pass


@verb
def pop(s):
    return 0


release = remove = hold


@verb
def touch(s, x, at):
    pass


@verb
def admit(s, x, at, hits):
    pass


@verb
def expect(s, content):
    pass


@verb
def tick(s):
    pass


@verb
def begin(s, moments, request):
    pass


@verb
def expired(s):
    return 0
