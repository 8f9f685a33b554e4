"""What one sequence has of the blocks of a layer group, and what is set aside for it."""

from __future__ import annotations

from kvlab.blocks.chain import Chain
from kvlab.blocks.names import Names
from kvlab.core import BlockId


class Claim:
    """Beside its table, what one sequence holds or waits for.

    chain     its tokens, as far as they are known
    found     what a lookup found, while the sequence is opened; with `gaps`, not all of it leads
    borrowed  blocks of the table that it pins and does not own
    pinned    blocks that the window protects
    slid      what the windows last acted on
    let_go    leading tokens that left the model's own window for good
    kept      pinned blocks behind a gap: they take their place when the gap has been computed
    reserved  blocks allocated ahead
    guarded   pinned while the sequence is opened, or making room might take what it begins with
    coming    tickets of the host tier for blocks on their way back, by logical index
    prompt    whole blocks of the prompt, which becomes known in one go; 0 without a prompt
    settled   leading whole blocks that are known or refused
    clean     leading tokens computed with no hole before them
    own       whole blocks that it computed and that are not known, rising
    seen      since when nobody else has made anything known, so that what was not found is new
    """

    __slots__ = (
        "chain", "found", "gaps", "borrowed", "pinned", "slid", "let_go", "kept", "guarded",
        "reserved", "coming", "prompt", "settled", "clean", "own", "seen",
    )  # fmt: skip

    def __init__(self, chain: Chain | Names | None, prompt: int = 0, clean: int = 0):
        self.chain, self.prompt, self.clean = chain, prompt, clean
        self.found: list[BlockId | None] = []
        self.gaps = False
        self.borrowed: set[BlockId] = set()
        self.pinned: set[BlockId] = set()
        self.slid: tuple | None = None
        self.let_go = 0
        self.kept: dict[int, BlockId] = {}
        self.guarded: list[BlockId] = []
        self.reserved: list[BlockId] = []
        self.coming: dict[int, int] = {}
        self.settled = 0
        self.own: list[int] = []
        self.seen: tuple | None = None
