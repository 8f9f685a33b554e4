"""Who may use which block: ledger, tables and the prefix index. No tensors here."""

from kvlab.blocks.ledger import FREE, LEAVING, OPEN, SEALED, BlockLedger, BlockStateError

__all__ = ["BlockLedger", "BlockStateError", "FREE", "LEAVING", "OPEN", "SEALED"]
