"""Why blocks of a prompt were not found."""

from __future__ import annotations

from collections.abc import Iterable

REMEMBERED = 1 << 20  # contents of each kind

# Codes of the blocks of a prompt, one letter each.
HIT, HOST_HIT, NEVER_SEEN, EVICTED, GAP, HOLE, LAST_TOKEN, TAIL = "hHneglrt"


class Reasons:
    """Remembers what left and what was never made known; `most` contents of each, 0: none."""

    def __init__(self, most: int = REMEMBERED):
        self.most = most
        self._left: dict[int, None] = {}  # the latest last
        self._refused: dict[int, None] = {}

    def left(self, contents: Iterable[int]) -> None:
        """These were evicted."""
        if self.most:
            self._note(self._left, contents)

    def refused(self, contents: Iterable[int]) -> None:
        """These were computed behind a hole."""
        if self.most:
            self._note(self._refused, contents)

    def _note(self, memory: dict[int, None], contents: Iterable[int]) -> None:
        for content in contents:
            memory.pop(content, None)
            memory[content] = None
        while len(memory) > self.most:
            del memory[next(iter(memory))]

    def codes(self, opened, chain) -> str:
        """A letter for each block of a prompt of which `opened` was found.

        h hit, H hit on the host, n never seen, e evicted, g held behind a gap, l computed behind
        a hole of a lossy cache, r held, but the last token of a prompt is always computed, t the
        prompt's last tokens fill no block.
        """
        away, names = set(opened.away), chain.names()
        codes = HIT * opened.near
        for index in range(opened.near, len(names)):
            codes += self._code(opened, away, names[index], index, chain)
        return codes + TAIL * (chain.tokens % chain.block_size > 0)

    def _code(self, opened, away: set[int], name: int, index: int, chain) -> str:
        block = opened.found[index]
        if index < opened.hit:
            return HOST_HIT if block is None else HIT
        if block is not None or index in away:
            last = index == opened.hit and (index + 1) * chain.block_size == chain.tokens
            return LAST_TOKEN if last else GAP
        if name in self._left:
            return EVICTED
        return HOLE if name in self._refused else NEVER_SEEN
