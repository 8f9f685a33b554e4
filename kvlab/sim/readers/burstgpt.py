"""BurstGPT: Timestamp (s), Request tokens, Response tokens, in later files Session ID.

A response of 0 tokens is a request that failed. https://github.com/HPMLL/BurstGPT (CC-BY-4.0)
"""

from __future__ import annotations

from kvlab.sim.readers.base import Numbers, Row
from kvlab.sim.readers.lengths import LengthsReader
from kvlab.sim.readers.lines import count, number


class BurstGPT(LengthsReader):
    name = "burstgpt"
    needs = ("Timestamp", "Request tokens", "Response tokens")

    def rows(self):
        self._sessions = Numbers()
        return super().rows()

    def row(self, where: str, cells: dict[str, str]) -> Row | None:
        prompt = count(where, "Request tokens", cells["Request tokens"])
        answer = count(where, "Response tokens", cells["Response tokens"])
        if not prompt or not answer:
            self.note("requests that failed (0 tokens) are left out")
            return None
        session = self._sessions[cells["Session ID"]] if cells.get("Session ID") else -1
        at = 1e3 * number(where, "Timestamp", cells["Timestamp"])
        return Row(at, prompt, answer, [], session)
