"""Rows of measurements -> entries: one line of a table, one point of a figure.

An entry is what one variant was measured as under one setting. Settings that merely spell out the
variant (format=int4 of the variant int4) are no setting in this sense; those under which a variant
was measured more than once are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from kvlab.report.names import order
from kvlab.report.source import Run
from kvlab.track import FAILED

DENSE = ("full", "baseline", "bf16", "fp16", "fp32")  # names a baseline goes by, first found wins
BYTES = "cache_allocated_bytes"
IN_USE = "cache_logical_bytes"
NO_BYTES, NO_SLAB = "no bytes saved", "no whole slab of 1,024 tokens saved"
CELLS = ("needle_recall_at_percent",)  # of a heatmap
LOSSES = ("kl_mean_nats", "perplexity_delta_percent")
LAYER_LOSS = "layer_kl_nats"  # of a heatmap by layer
SHARES = ("agreement_percent", "recall_percent", "score_percent", "hit_percent")
CELL = "_at_percent"  # how names of cells end, of any task: too many for a table


@dataclass
class Entry:
    """`conditions`: setting -> value; `rows`: measurement name -> its row (the last one given).

    failure: the row that says why the variant raised, if it did.
    twin: an earlier variant that lost the very same, "" where there is none.
    """

    run: Run
    variant: str
    conditions: dict
    rows: dict[str, dict] = field(default_factory=dict)
    baseline: Entry | None = None
    failure: dict | None = None
    twin: str = ""

    def value(self, name: str) -> float | None:
        return self.rows[name]["value"] if name in self.rows else None

    @property
    def is_baseline(self) -> bool:
        return self.baseline is self

    @property
    def bytes_ratio(self) -> float | None:
        """Allocated bytes over the baseline's."""
        other = self.baseline.value(BYTES) if self.baseline else None
        return self.value(BYTES) / other if other and self.value(BYTES) is not None else None

    @property
    def notes(self) -> list[str]:
        """What a reader must not miss."""
        if self.is_baseline:
            return ["baseline"]
        ratio = self.bytes_ratio
        told = [f"{what}: {c}" for what, c in (("control", self.control), ("caution", self.caution))
                if c]
        told += [f"lost the very same as {self.twin}: one cache by two names"] * bool(self.twin)
        if ratio is not None and ratio >= 1:
            told.append(NO_SLAB if self.hidden else NO_BYTES)
        return told

    @property
    def hidden(self) -> bool:
        """Whether it uses fewer bytes than the baseline, by a share that its slabs do not show."""
        other, mine = self.baseline and self.baseline.value(IN_USE), self.value(IN_USE)
        ratio = self.bytes_ratio
        return bool(other and mine is not None and ratio and mine / other < 0.9 * ratio)

    @property
    def control(self) -> str:
        """What a negative control or noise floor is, "" of a variant in earnest."""
        return self._said("control")

    @property
    def caution(self) -> str:
        """What is known to go wrong with it, "" where nothing is."""
        return self._said("caution")

    def _said(self, param: str) -> str:
        """A parameter of its rows as text, "" where there is none."""
        rows = [*self.rows.values(), *([self.failure] if self.failure else [])]
        return next((str(r["params"].get(param) or "") for r in rows), "")

    @property
    def status(self) -> str:
        return "failed" if self.failure else ""

    @property
    def reason(self) -> str:
        return str(self.failure.get("reason", "")) if self.failure else ""


def entries(runs: list[Run]) -> list[Entry]:
    """All entries in the order in which they were measured, each with its baseline, if any."""
    keys = conditions([row for run in runs for row in run.rows if _is_whole(row)])
    found: dict[str, Entry] = {}
    for run in runs:
        for row in filter(_is_whole, run.rows):
            under = {key: row["params"][key] for key in keys if key in row["params"]}
            identity = json.dumps([run.name, row["variant"], under], sort_keys=True)
            entry = found.setdefault(identity, Entry(run, row["variant"], under))
            if row["name"] == FAILED:
                entry.failure = row
            else:
                entry.rows[row["name"]] = within_bounds(row)
    everything = list(found.values())
    for entry in everything:
        entry.baseline = _baseline(entry, everything)
    _twins(everything)
    return everything


def _twins(everything: list[Entry]) -> None:
    """Name the earlier of two variants whose losses are equal to the last bit, as those of settings
    that come out as the same blocks. What loses nothing has no twin."""
    seen: dict[tuple, str] = {}
    for entry in everything:
        losses = tuple(entry.value(name) for name in LOSSES)
        if all(losses) and not entry.is_baseline:
            key = (entry.run.name, json.dumps(entry.conditions, sort_keys=True), losses)
            entry.twin = seen.get(key, "")
            seen.setdefault(key, entry.variant)


def within_bounds(row: dict) -> dict:
    """The row with an interval that ends where its measurement does: a KL at 0, a share at 0 and
    100 %. Rows from before intervals kept to that cross it; the part beyond holds no possible
    value, so to cut it off costs no coverage."""
    share = row["name"].endswith(SHARES) and "delta" not in row["name"]
    kl = row["name"].startswith("kl_") and "_minus_" not in row["name"]
    if not (share or kl) or row["low"] is None or row["high"] is None:
        return row
    most = 100.0 if share else float("inf")
    return {**row, "low": max(0.0, row["low"]), "high": min(most, row["high"])}


def _is_whole(row: dict) -> bool:
    """Neither one cell of a heatmap nor one document of several."""
    cell = row["name"].endswith(CELL) or row["name"] == LAYER_LOSS
    return not cell and row.get("step") is None


def conditions(rows: list[dict]) -> list[str]:
    """Settings that some variant was measured under with more than one value, in order."""
    seen: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for key, value in row["params"].items():
            seen.setdefault((key, row["variant"]), set()).add(json.dumps(value, sort_keys=True))
    return list(dict.fromkeys(key for (key, _), values in seen.items() if len(values) > 1))


def names(everything: list[Entry]) -> list[str]:
    """Measurement names, known ones in their fixed order."""
    return order([name for entry in everything for name in entry.rows])


def _baseline(entry: Entry, everything: list[Entry]) -> Entry | None:
    """The full cache under the same conditions, of the same run, else of any other."""
    same = [other for other in everything if _comparable(other, entry)]
    for near in ([o for o in same if o.run is entry.run], same):
        near.sort(key=lambda o: (o.conditions != entry.conditions, -_shared(o, entry)))
        declared = [o for o in near if any(r["params"].get("baseline") for r in o.rows.values())]
        named = [o for name in DENSE for o in near if o.variant == name]
        if declared or named:
            return (declared or named)[0]
    return None


def _shared(a: Entry, b: Entry) -> int:
    return len(a.conditions.keys() & b.conditions.keys())


def _comparable(a: Entry, b: Entry) -> bool:
    shared = a.conditions.keys() & b.conditions.keys()
    return all(a.conditions[key] == b.conditions[key] for key in shared)
