"""The tokens of a sequence as far as they are known, with the chained hash of each whole block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from xxhash import xxh3_64_intdigest

TOKEN = np.dtype("<i8")  # how token ids are hashed and compared, on every machine


def origin(identity: str, block_size: int) -> int:
    """Where a chain of hashes begins."""
    return xxh3_64_intdigest(f"{identity}\n{block_size}".encode())


def as_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as the bytes that are hashed and compared."""
    return np.ascontiguousarray(token_ids, dtype=TOKEN).tobytes()


class Chain:
    """Token ids that may still grow, hashed block by block and each block once.

    identity, block_size: where the chain begins, see `PrefixIndex`.
    """

    __slots__ = ("block_size", "changes", "_origin", "_raw", "_names")

    def __init__(self, identity: str, block_size: int, token_ids: Sequence[int] = ()):
        self.block_size, self._origin = block_size, origin(identity, block_size)
        self._raw, self._names = bytearray(as_bytes(token_ids)), []
        self.changes = 0

    def copy(self) -> Chain:
        """An independent chain of the same tokens."""
        other = Chain.__new__(Chain)
        other.block_size, other._origin = self.block_size, self._origin
        other._raw, other._names, other.changes = bytearray(self._raw), list(self._names), 0
        return other

    @property
    def tokens(self) -> int:
        """Tokens known."""
        return len(self._raw) // TOKEN.itemsize

    def __len__(self) -> int:
        """Whole blocks known."""
        return self.tokens // self.block_size

    def ids(self) -> np.ndarray:
        """The known token ids, int64 [tokens], a copy."""
        return np.frombuffer(bytes(self._raw), dtype=TOKEN)

    def tell(self, at: int, token_ids: Sequence[int]) -> None:
        """Say that tokens [at, at + n) are these; whatever was known from `at` on and differs is
        forgotten. Tokens behind a gap stay unknown."""
        if at > self.tokens:
            return
        new, start = as_bytes(token_ids), at * TOKEN.itemsize
        if self._raw[start : start + len(new)] != new:
            self.cut(at)
            self._raw += new
            self.changes += 1

    def cut(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        self.changes += 1
        del self._raw[length * TOKEN.itemsize :]
        del self._names[length // self.block_size :]

    def starts_with(self, token_ids: Sequence[int]) -> int:
        """How many leading tokens the chain shares with `token_ids`."""
        mine, other = self.ids(), np.frombuffer(as_bytes(token_ids), dtype=TOKEN)
        both = min(len(mine), len(other))
        apart = np.flatnonzero(mine[:both] != other[:both])
        return int(apart[0]) if len(apart) else both

    def names(self, stop: int | None = None) -> list[int]:
        """Contents of the first `stop` whole blocks (all): what `BlockLedger.seal` wants."""
        stop = len(self) if stop is None else min(stop, len(self))
        names, step = self._names, self.block_size * TOKEN.itemsize
        name = names[-1] if names else self._origin
        whole = bytes(self._raw[len(names) * step : stop * step])
        for start in range(0, len(whole), step):
            name = xxh3_64_intdigest(whole[start : start + step], name)
            names.append(name)
        return names[:stop]

    def coming(self, logical: Sequence[int]) -> list[int]:
        """Names of these blocks as far as they are known, the last first."""
        return backwards(self.names(), logical)

    def lineage(self, logical: Sequence[int]) -> tuple[Sequence[int], list[int | None]]:
        """Depth of each of these whole blocks, and the name of the block before it."""
        return logical, picked([None, *self.names()], logical)

    def raw(self, index: int) -> bytes:
        """Token bytes of a whole block, to tell equal names from equal blocks."""
        step = self.block_size * TOKEN.itemsize
        return bytes(self._raw[index * step : (index + 1) * step])

    def items(self, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(name, token bytes) of the first `stop` whole blocks."""
        names, step = self.names(stop), self.block_size * TOKEN.itemsize
        whole = bytes(self._raw[: len(names) * step])
        return zip(names, (whole[at : at + step] for at in range(0, len(whole), step)))


class CutOff(Chain):
    """The tokens of a sequence that may not be known to others: none are, ever.

    outdated: since it began under another identity.
    """

    __slots__ = ("outdated",)

    def __init__(self, block_size: int, outdated: bool = False):
        super().__init__("", block_size)
        self.outdated = outdated

    def copy(self):
        return CutOff(self.block_size, self.outdated)

    def tell(self, at, token_ids):
        """What two models or unknown inputs computed is the prefix of no other."""


def picked(items: list, logical: Sequence[int]) -> list:
    """items[i] for each of `logical`: a slice where these fall one by one, as they mostly do."""
    if isinstance(logical, range) and logical.step == -1:
        return items[logical.stop + 1 : logical.start + 1][::-1]
    return [items[i] for i in logical]


def leading(found: list) -> int:
    """How many blocks are held before the first gap."""
    return found.index(None) if None in found else len(found)


def backwards(names: list[int], logical: Sequence[int]) -> list[int]:
    """The names of these blocks, rising, that are among `names`; the last first."""
    if isinstance(logical, range):
        return picked(names, range(min(logical.stop, len(names)) - 1, logical.start - 1, -1))
    return [names[i] for i in reversed(logical) if i < len(names)]
