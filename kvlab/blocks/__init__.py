"""Who may use which block: ledger, tables and the prefix index. No tensors here."""

from __future__ import annotations

from kvlab.blocks.chain import Chain
from kvlab.blocks.ledger import BlockLedger
from kvlab.blocks.prefix import NoPrefix, PrefixIndex, chained_hashes
from kvlab.blocks.prefix_cache import OWNER, PrefixCache, PrefixHandle
from kvlab.blocks.replay import replay, victims
from kvlab.blocks.sharing import HashSharing, NoSharing
from kvlab.blocks.states import FREE, LEAVING, OPEN, SEALED, BlockStateError
from kvlab.blocks.table import BlockTable, HoleError, SlotRun

__all__ = [
    "BlockLedger", "BlockStateError", "BlockTable", "Chain", "FREE", "HashSharing", "HoleError",
    "LEAVING", "NoPrefix", "NoSharing", "OPEN", "OWNER", "PrefixCache", "PrefixHandle",
    "PrefixIndex", "SEALED", "SlotRun", "chained_hashes", "replay", "victims",
]  # fmt: skip
