"""What WA-LRU says of its classes: kind of request (see `moments`) and tokens by powers of two.

`notes` has the requests of each kind so far, and behind them how many of those were followed.
"""

from math import inf

from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.moments import BEFORE, MOST_TURNS, TOKENS, TOOL, TURN
from kvlab.sim.compiled.moments import MS as AT
from kvlab.sim.compiled.state import MINE, OWN

KINDS, SIZES = 2 * (MOST_TURNS + 1), 32
COUNT, NOTES, NEVER = KINDS * SIZES, 2 * KINDS, inf
ROWS = 0, COUNT
RECENCY, REUSE, SIZE, HORIZON, MS, MOST = range(OWN + 1, OWN + 7)
KIND, BITS = MINE + 3, MINE + 4  # of the request under way


def prepare(state, policy):
    state.key[RECENCY : SIZE + 1] = policy.recency, policy.reuse, policy.size
    state.key[HORIZON], state.key[MOST] = 1e3 * policy.horizon, 1


@verb
def begin(s, moments, request):
    row, notes = moments[request], s.notes
    kind = int(row[TOOL]) * (MOST_TURNS + 1) + int(row[TURN])
    if row[BEFORE] >= 0:
        notes[KINDS + int(row[BEFORE])] += 1
    notes[kind] += 1
    s.key[MS], s.key[MOST] = row[AT], max(s.key[MOST], row[TOKENS])
    tokens, bits = int(row[TOKENS]), 0
    while tokens and bits < SIZES - 1:
        tokens >>= 1
        bits += 1
    s.book[KIND], s.book[BITS] = kind, bits


@verb
def row(s, x):
    return s.book[KIND] * SIZES + s.book[BITS]


@verb
def clock(s):
    return s.key[MS]


@verb
def worth(s, row, since):
    kind, bits = row // SIZES, row % SIZES
    again = (s.notes[KINDS + kind] + 1) / (s.notes[kind] + 2)
    age = min(1.0, (s.key[MS] - since) / s.key[HORIZON])
    tokens = min(1.0, (1 << bits) / s.key[MOST])
    return -(s.key[RECENCY] * age + s.key[REUSE] * (1 - again) + s.key[SIZE] * tokens)
