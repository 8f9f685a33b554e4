"""What a server knows of a request when it comes: the only time of the day that policies get."""

from __future__ import annotations

from typing import NamedTuple

from kvlab.core import BadInput


class Moment(NamedTuple):
    """The request under way. Nothing in it lies in the future.

    number: of the request, rising. ms: time of the trace or the server. session: which conversation
    it goes on, -1 unknown. turn: requests of that session before it, 0 where unknown. tokens: of
    its prompt. tool: whether its answer ends by calling a tool (None unknown); the server knows it
    when the answer is done, and before that the blocks of the request are pinned.
    """

    number: int
    ms: float = 0.0
    session: int = -1
    turn: int = 0
    tokens: int = 0
    tool: bool | None = None


NOW = Moment(-1)  # before any request came


def refuse_expiring(key: str, member) -> None:
    """Raise `BadInput` for a member whose blocks end by themselves: only a ledger can free them."""
    if member.expires:
        remedy = "gives blocks up by their age, which only works on its own; name another member"
        raise BadInput(key, member.name, remedy)
