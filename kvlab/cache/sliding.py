"""What a model's own sliding window lets go: tokens that no query of a layer group sees again."""

from __future__ import annotations

from kvlab.core import KvlabError, SeqId
from kvlab.window import Range

SPARE = 32  # tokens kept behind the window, for those who take back what they have just drafted


class Sliding:
    """window: tokens that a query sees, itself included; None where it sees all of the past, or
    where what it no longer sees is kept (prefix=hash: others may begin with it).

    let_go: tokens at the head of each sequence whose blocks were freed.
    """

    def __init__(self, window: int | None, block_size: int):
        self.window, self.block_size = window, block_size
        self.let_go: dict[SeqId, int] = {}

    def open(self, seq: SeqId) -> None:
        self.let_go[seq] = 0

    def close(self, seq: SeqId) -> None:
        del self.let_go[seq]

    def fork(self, parent: SeqId, child: SeqId) -> None:
        self.let_go[child] = self.let_go[parent]

    def within(self, ranges: list[Range], length: int) -> list[Range]:
        """Those parts of token `ranges` that a query may still come to see."""
        if self.window is None:
            return ranges
        first = max(0, length - self.window + 1 - SPARE)
        return [(max(begin, first), end) for begin, end in ranges if end > first]

    def slid(self, seq: SeqId, length: int) -> int:
        """Leading blocks that are free to go at this length."""
        if self.window is None:
            return 0
        blocks = max(0, length - self.window + 1 - SPARE) // self.block_size
        self.let_go[seq] = max(self.let_go[seq], blocks * self.block_size)
        return blocks

    def check_crop(self, seq: SeqId, length: int) -> None:
        """Raises `KvlabError` if the next token would see what was let go."""
        if length and self.window is not None and length - self.window + 1 < self.let_go[seq]:
            raise KvlabError(
                f"cannot crop to {length} tokens: the model's sliding window of {self.window} "
                f"would reach back to the first {self.let_go[seq]}, which it had left behind"
            )
        if not length:
            self.let_go[seq] = 0

    def check_reach(self, seq: SeqId, past: int, window: int | None) -> None:
        """Raises `KvlabError` if a token behind `past` others would see what was let go."""
        gone = self.let_go[seq]
        if gone and (window is None or past - window + 1 < gone):
            raise KvlabError(
                f"this forward asks a layer for more than the sliding window of {self.window} "
                f"tokens that its model has, and the first {gone} tokens were let go"
            )
