"""All that attention may read, under one contract: see `Source`."""

from kvlab.source.base import Ask, Part, Read, Source, Token
from kvlab.source.chosen import Choice
from kvlab.source.digests import Digests
from kvlab.source.entries import Summaries, check_summary
from kvlab.source.host import Host
from kvlab.source.sealed import Sealed
from kvlab.source.sources import Sources
from kvlab.source.step import Extent
from kvlab.source.sum import Sum, folded, merged, over_all
from kvlab.source.tables import DecodeTables, sent
from kvlab.source.tail import Tail

__all__ = [
    "Ask", "Choice", "DecodeTables", "Digests", "Extent", "Host", "Part", "Read", "Sealed",
    "Source", "Sources", "Sum", "Summaries", "Tail", "Token", "check_summary", "folded",
    "merged", "over_all", "sent",
]  # fmt: skip
