"""Admission by cost: prompts of so many tokens."""

from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.moments import TOKENS as IN_PROMPT
from kvlab.sim.compiled.state import CHILDREN, MINE

DOOR_WIDTH = CHILDREN
LEAST, LONG = MINE, MINE + 1  # in `book` of the door: tokens; whether the prompt has them


def prepare(door, policy):
    door.book[LEAST] = policy.tokens


@verb
def begin(s, moments, request):
    s.door.book[LONG] = moments[request, IN_PROMPT] >= s.door.book[LEAST]


@verb
def admits(s, x, new):
    return s.door.book[LONG] != 0


@verb
def left(s, x):
    pass
