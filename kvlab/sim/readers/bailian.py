"""Qwen-Bailian (ATC'25): one request a line, blocks of 16 tokens, chats by their parents.

`timestamp` is in seconds. A turn names the one before it by `parent_chat_id` (-1: the first). The
hash of a last, partial block covers padding or what was answered, so that id is left out here.
Thinking is taken out of a prompt before the next turn, so answers of thinking models do not come
back as they were.
https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon
"""

from __future__ import annotations

from collections.abc import Iterator

from kvlab.core import BadInput
from kvlab.sim.readers.base import Reader, Row


class Bailian(Reader):
    name = "bailian"
    needs = (
        "chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids",
    )  # fmt: skip
    default_block = 16
    whole_blocks = True

    def rows(self) -> Iterator[tuple[str, Row]]:
        self.note("ids of partial last blocks are left out: they cover what is not of the prompt")
        root: dict[object, int] = {}
        for where, row in self.records():
            parent = row["parent_chat_id"]
            if parent != -1 and parent not in root:
                self.note("turns whose parent is not in the file ahead of them begin a session")
            root[row["chat_id"]] = session = root.get(parent, len(root))
            yield where, self._row(where, row, session)

    def _row(self, where: str, row: dict, session: int) -> Row:
        at, tokens, ids = row["timestamp"], row["input_length"], row["hash_ids"]
        if type(at) not in (int, float):
            raise BadInput("trace.path", where, f"timestamp must be seconds, not {at!r}")
        if isinstance(ids, list) and type(tokens) is int:
            whole = tokens // self.block_size
            if len(ids) == whole + 1 and tokens % self.block_size:
                ids = ids[:whole]
        return Row(1e3 * at, tokens, row["output_length"], ids, session)
