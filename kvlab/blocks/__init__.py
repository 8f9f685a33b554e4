"""Who may use which block: ledger, tables, prefix index, and what requests do with them. No tensors
here."""

from __future__ import annotations

from kvlab.blocks.alone import Alone
from kvlab.blocks.chain import Chain, CutOff, leading
from kvlab.blocks.ground import Ground
from kvlab.blocks.holding import Holding
from kvlab.blocks.ledger import BlockLedger
from kvlab.blocks.names import NameIndex, Names
from kvlab.blocks.prefix import PrefixIndex, chained_hashes
from kvlab.blocks.prefixes import Prefixes, PrefixHandle
from kvlab.blocks.reasons import Reasons
from kvlab.blocks.replay import replay, victims
from kvlab.blocks.sequences import Sequences
from kvlab.blocks.serving import Serving
from kvlab.blocks.shared import Shared
from kvlab.blocks.sharing import HashSharing, NoSharing
from kvlab.blocks.sliding import check_reach, slide
from kvlab.blocks.states import FREE, LEAVING, OPEN, SEALED, BlockStateError
from kvlab.blocks.step import Opened, Step
from kvlab.blocks.storage import Holes, NoStorage
from kvlab.blocks.table import BlockTable, HoleError, SlotRun
from kvlab.blocks.tiers import (
    MODES,
    HostTier,
    NoTier,
    WriteBack,
    WriteThrough,
    mode_by_name,
)

__all__ = [
    "Alone", "BlockLedger", "BlockStateError", "BlockTable", "Chain", "CutOff", "FREE",
    "Ground", "HashSharing", "Holding", "HoleError", "Holes", "HostTier", "LEAVING", "MODES",
    "NameIndex", "Names", "NoSharing", "NoStorage", "NoTier", "OPEN", "Opened", "PrefixHandle",
    "PrefixIndex", "Prefixes", "Reasons", "SEALED", "Sequences", "Serving", "Shared", "SlotRun",
    "Step", "WriteBack", "WriteThrough", "chained_hashes", "check_reach", "leading",
    "mode_by_name", "replay", "slide", "victims",
]  # fmt: skip
