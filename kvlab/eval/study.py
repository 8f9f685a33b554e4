"""Several jobs in one run folder, over the same variants."""

from __future__ import annotations

from kvlab.core import Variant


class Study:
    """Quality over all tokens, then recall of needles; one folder, one report.

    quality, recall: the jobs; null leaves one out. Their rows differ in `tokens` and are resumed
    each for itself.
    """

    wants_specs = True

    def __init__(self, quality, recall):
        self.parts = [part for part in (quality, recall) if part is not None]

    def run(self, folder, variants: list[Variant]) -> None:
        """Run what the folder lacks."""
        for part in self.parts:
            part.run(folder, variants)
