"""How one sequence of a layer group becomes two, and what a crop of one takes.

All of it or nothing; functions over a `Holding`.
"""

from __future__ import annotations

from collections import Counter

from kvlab.blocks import sliding
from kvlab.blocks.chain import Chain
from kvlab.core import BlockId, KvlabError, SeqId


def fork(holding, parent: SeqId, child: SeqId, chain: Chain | None = None) -> None:
    """`child` shares sealed blocks of `parent` and copies its open tail, for which there is room.

    chain: a copy of the parent's, the same for all layer groups. An error of the allocator leaves
    everything as it was.
    """
    holding.enter(child, None, 0)
    try:
        _inherit(holding, parent, child, chain)
    except BaseException:  # an interrupt, too
        holding.close(child, done=False)
        raise


def _inherit(holding, parent, child, chain) -> None:
    source, table = holding.tables[parent], holding.tables[child]
    old, new = holding.claims[parent], holding.claims[child]
    new.chain, new.prompt, new.clean, new.settled = chain, old.prompt, old.clean, old.settled
    new.let_go = old.let_go
    fill = source.length % holding.block_size
    shared = source.ids[:-1] if fill else list(source.ids)
    held = [b for b in shared if b is not None]
    holding.ledger.pin(held)
    new.borrowed.update(held)
    table.append(shared)
    if fill:
        table.append([_copy_tail(holding, source.ids[-1], fill)])
    table.length = source.length  # the last block is full or a copy of the same tail
    holding.storage.fork(parent, child)


def _copy_tail(holding, tail: BlockId, fill: int) -> BlockId:
    (block,) = holding.room.allocate(None, 1)
    try:
        holding.storage.copy_tail(tail, block, fill)
    except BaseException:
        holding.ground.free([block])
        raise
    return block


def check_crop(holding, seq: SeqId, length: int) -> None:
    """Raises `KvlabError` if the block that `crop` would cut was evicted, or what the next token
    sees behind it has left the model's own window."""
    sliding.check_back(holding, seq, length)
    whole, fill = divmod(length, holding.block_size)
    gone = fill and holding.tables[seq].ids[whole] is None
    if gone and not holding.storage.has(seq, whole):
        raise KvlabError(f"cannot crop to {length} tokens: block {whole} of them was evicted; "
                         f"crop to a multiple of {holding.block_size}")


def crop(holding, seq: SeqId, length: int) -> None:
    """Forget all tokens from `length` on, after `make_crop_room`.

    A sealed block that is cut becomes open again from its stored contents.
    """
    table, size = holding.tables[seq], holding.block_size
    whole, fill = divmod(length, size)
    stop = whole + bool(fill)
    dropped, cut = table.ids[stop:], table.ids[whole] if fill else None
    was_open = bool(table.length % size) and whole == table.length // size
    holding.sharing.forget_tokens(seq, length, not fill or was_open or holding.storage.exact)
    del table.ids[stop:]
    table.length = length
    table.changes += 1
    holding.release(seq, [b for b in reversed(dropped) if b is not None])
    holding.storage.crop(seq, whole, fill)
    if fill and not was_open:
        _reopen(holding, seq, whole, cut, fill)


def _reopen(holding, seq: SeqId, index: int, cut: BlockId | None, fill: int) -> None:
    """Read first, release, then allocate: in a full cache the block takes its own place."""
    table = holding.tables[seq]
    contents = holding.storage.lift(seq, index, cut, fill)
    table.ids[index] = None
    if cut is not None:
        holding.release(seq, [cut])
    (table.ids[index],) = (block,) = holding.room.allocate(seq, 1)
    table.changes += 1
    holding.storage.put_down(seq, index, block, contents)


def make_crop_room(holding, lengths: dict[SeqId, int]) -> None:
    """Make room for the open copies of the sealed blocks that these crops cut, in this order.

    A crop gives its blocks back before it takes one, but what another sequence holds does not
    come free. Raises `OutOfBlocks` before anything has changed.
    """
    given: Counter[BlockId] = Counter()
    kept, short, most = [], 0, 0
    for seq, length in lengths.items():
        ids = holding.tables[seq].ids[length // holding.block_size :]
        held = [b for b in ids if b is not None]
        stays = _stays_open(holding, seq, length)
        cuts = length % holding.block_size > 0 and not stays
        freed = [b for b in held[stays:] if _frees(holding, seq, b, given)]
        short += cuts - len(freed)
        most = max(most, short)
        kept += freed + held[:cuts]  # what is still to be read, and what is counted on
    holding.ledger.pin(kept)
    try:
        holding.room.make(most)
    finally:
        holding.ledger.unpin(kept)


def _stays_open(holding, seq: SeqId, length: int) -> bool:
    """Whether a crop ends within the open tail, which stays where it is."""
    fill, old = length % holding.block_size, holding.tables[seq].length
    same = length // holding.block_size == old // holding.block_size
    return bool(fill and old % holding.block_size and same)


def _frees(holding, seq: SeqId, block: BlockId, given: Counter[BlockId]) -> bool:
    """Whether `block` is free once `seq` lets go of it as others have; counts that in."""
    meta, claim = holding.ledger.meta(block), holding.claims[seq]
    owned = block in claim.borrowed or bool(holding.known.mortal([block]))
    given[block] += owned + (block in claim.pinned)
    return given[block] == meta.pins + (not meta.doomed)
