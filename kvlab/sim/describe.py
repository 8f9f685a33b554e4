"""What a trace is: its statistics, its ideal hit rates, reuse, working sets, what was assumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kvlab.core import BadInput, Measurement
from kvlab.sim.bounds import smallest_ideal_capacity
from kvlab.sim.curves import not_hittable, partial_access
from kvlab.sim.definitions import Definitions
from kvlab.sim.diagnose import file_name, reuse, working_set
from kvlab.sim.files import write_trace
from kvlab.sim.jobs import about, listed, refuse_variants
from kvlab.sim.outcome import HIT, MISS, PARTIAL, Outcome, Tally
from kvlab.sim.result import SimResult
from kvlab.sim.sessions import Sessions
from kvlab.sim.sizes import shape_by_name
from kvlab.sim.trace import Trace

_IDEAL = ("block_hit", "token_hit", "request_any_hit", "request_mean_hit")


def ideal(trace: Trace, partial_blocks: str = "hit") -> SimResult:
    """The result of a cache without end: every block that was asked for before hits."""
    trace.check_prefix_chained()
    code = np.where(trace.previous >= 0, HIT, MISS).astype(np.uint8)
    if not_hittable(partial_blocks):
        code[partial_access(trace) & (code == HIT)] = PARTIAL
    tally, none = Tally(shape_by_name("llama-3.1-8b"), None), np.empty(0, dtype=np.int64)
    tally.add(trace, Outcome(code, none, none))
    return SimResult.of(tally, "unbounded", trace.dense[1], trace.block_size)


def from_other_sessions(trace: Trace) -> float | None:
    """Percent of the accesses whose block only other sessions had asked for before; None without
    sessions. A request without one is its own."""
    if "session" not in trace.columns:
        return None
    session = trace.columns["session"]
    session = np.where(session < 0, -1 - np.arange(len(trace)), session)[trace.request_of]
    ids, count = trace.dense
    _, session = np.unique(session, return_inverse=True)
    pairs = len(np.unique(session * count + ids))
    return 100.0 * (pairs - len(np.unique(ids))) / max(trace.accesses, 1)


class TraceFacts:
    """Prints what each trace is and writes it as rows; no policy, no capacity.

    partial_blocks, measured, outputs, first_requests, common_head: as in `Definitions`.
    window_seconds: of the working set. write: a file to write the (one) trace to in Mooncake's
    form, for other tools.
    sessions: as in `Sessions`; null: as recorded. It is written as they make it.
    """

    def __init__(
        self,
        traces: Trace | Sequence[Trace],
        partial_blocks: str = "hit",
        measured: Sequence[float] = (0.0, 1.0),
        outputs: str = "dropped",
        first_requests: str = "counted",
        window_seconds: float = 60.0,
        write: str | None = None,
        sessions: Sessions | None = None,
        common_head: str = "counted",
    ):
        sessions = sessions or Sessions()
        self.definitions = Definitions(
            partial_blocks, measured, outputs, first_requests, common_head
        )
        self.plain = [sessions.apply(trace) for trace in listed(traces)]
        self.window_seconds, self.write = window_seconds, write
        self._fixed = {**self.definitions.params(), **sessions.params()}
        self.traces = [self.definitions.apply(t) if t.shares else t for t in self.plain]
        if write is not None and len(self.plain) != 1:
            raise BadInput("write", write, f"takes one trace, not {len(self.plain)}")
        if not window_seconds > 0:
            raise BadInput("window_seconds", window_seconds, "must be more than 0")

    def run(self, folder, variants: Sequence = ()) -> None:
        refuse_variants(variants)
        for plain, trace in zip(self.plain, self.traces):
            params = {**about(trace), "format": trace.format, **self._fixed}
            params["window_seconds"] = self.window_seconds
            with folder.surviving("trace", params):
                self._tell(folder, plain, trace, params)
        if self.write is not None:
            print(f"written: {write_trace(self.plain[0], self.write, plain=True)}")

    def _tell(self, folder, plain: Trace, trace: Trace, params: dict) -> None:
        rows = [*shape_of(plain), *(self._rates(trace) if trace.shares else ())]
        print(*self._lines(trace, rows), sep="\n")
        if not folder.done("trace", params):
            folder.add("trace", params, rows)
            self._arrays(folder, trace)

    def _rates(self, trace: Trace) -> Iterator[Measurement]:
        result = ideal(trace, self.definitions.replayed)
        for name in _IDEAL:
            value = getattr(result, f"{name}_percent")
            yield Measurement(f"ideal_{name}_percent", value, "%", "higher")
        other = from_other_sessions(trace)
        if other is not None:
            yield Measurement("other_session_percent", other, "%")
        yield from server_rate(trace)
        yield from self._reuse(trace)

    def _reuse(self, trace: Trace) -> Iterator[Measurement]:
        again, (_, blocks) = reuse(trace), working_set(trace, self.window_seconds)
        if len(again.age_ms):
            for q in (50, 90, 99):
                distance = float(np.percentile(again.distance_blocks, q))
                age = float(np.percentile(again.age_ms, q)) / 1e3
                yield Measurement(f"reuse_distance_p{q}_blocks", distance, "blocks")
                yield Measurement(f"reuse_age_p{q}_seconds", age, "s")
        if len(blocks):
            yield Measurement("working_set_blocks", float(blocks.mean()), "blocks")
            yield Measurement("working_set_peak_blocks", float(blocks.max()), "blocks")
        capacity = float(smallest_ideal_capacity(trace))
        yield Measurement("smallest_ideal_capacity_blocks", capacity, "blocks")

    def _arrays(self, folder, trace: Trace) -> None:
        if trace.shares:
            starts, blocks = working_set(trace, self.window_seconds)
            arrays = {"working_set_seconds": starts, "working_set_blocks": blocks}
            folder.arrays(file_name(f"trace_{trace.name}"), **reuse(trace)._asdict(), **arrays)

    def _lines(self, trace: Trace, rows: Sequence[Measurement]) -> Iterator[str]:
        yield f"{trace.name}: {trace.format}, blocks of {trace.block_size} tokens" + (
            ", whole ones only" if trace.whole_blocks else ""
        )
        for row in rows:
            yield f"  {row.name:34} {row.value:>16,.2f} {row.unit}"
        if trace.shares:
            _, blocks = working_set(trace, self.window_seconds)
            yield f"  working set over time, {self.window_seconds:g} s: {bars(blocks)}"
            counts = ", ".join(f"{k}={v}" for k, v in self._fixed.items())
            yield f"  counted: {counts}"
        for sentence in trace.notes:
            yield f"  assumed: {sentence}"
        if not trace.shares:
            yield "  no hit rates: nothing is known of prefixes"


def bars(values: np.ndarray, width: int = 60) -> str:
    """At most `width` bars, each the mean of its share of the values, the highest full."""
    if not len(values):
        return ""
    parts = [part.mean() for part in np.array_split(values, min(width, len(values)))]
    top = max(max(parts), 1)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * part / top))] for part in parts)


def shape_of(trace: Trace) -> Iterator[Measurement]:
    """Counts, lengths and times of a trace."""
    yield Measurement("requests", len(trace), "requests")
    if "session" in trace.columns:
        session = trace.columns["session"]
        alone = np.count_nonzero(session < 0)
        sessions = len(np.unique(session[session >= 0])) + alone
        yield Measurement("sessions", float(sessions), "sessions")
    if trace.shares:
        yield Measurement("block_accesses", trace.accesses, "blocks")
        yield Measurement("distinct_blocks", len(np.unique(trace.ids)), "blocks")
    for name, tokens in (("input", trace.input_tokens), ("output", trace.output_tokens)):
        yield Measurement(f"{name}_tokens", float(tokens.sum()), "tokens")
        yield Measurement(f"{name}_tokens_mean", float(tokens.mean()), "tokens")
        for q in (50, 99, 100):
            yield Measurement(f"{name}_tokens_p{q}", float(np.percentile(tokens, q)), "tokens")
    yield Measurement("seconds", float(trace.arrival_ms[-1] - trace.arrival_ms[0]) / 1e3, "s")
    think = trace.columns.get("think_ms")
    if think is not None:
        yield Measurement("think_p50_seconds", float(np.nanmedian(think)) / 1e3, "s")


def server_rate(trace: Trace) -> Iterator[Measurement]:
    """Percent of the prompt tokens that the traced server said it had; nothing where it did not."""
    cached = trace.columns.get("cached_tokens")
    if cached is not None:
        said = cached >= 0
        percent = 100.0 * cached[said].sum() / trace.input_tokens[said].sum()
        count = int(np.count_nonzero(said))
        yield Measurement("server_token_hit_percent", float(percent), "%", count=count)
