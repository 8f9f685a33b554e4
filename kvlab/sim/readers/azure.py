"""Azure LLM inference traces (2023, 2024, multimodal 2025): a date and two lengths a request.

https://github.com/Azure/AzurePublicDataset (CC-BY)
"""

from __future__ import annotations

from kvlab.sim.readers.base import Row
from kvlab.sim.readers.lengths import LengthsReader
from kvlab.sim.readers.lines import count, milliseconds


class Azure(LengthsReader):
    name = "azure"
    needs = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

    def row(self, where: str, cells: dict[str, str]) -> Row | None:
        prompt = count(where, "ContextTokens", cells["ContextTokens"])
        if not prompt:
            self.note("requests without input are left out")
            return None
        at = milliseconds(where, "TIMESTAMP", cells["TIMESTAMP"])
        return Row(at, prompt, count(where, "GeneratedTokens", cells["GeneratedTokens"]), [])
