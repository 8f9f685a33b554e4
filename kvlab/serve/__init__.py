"""Many sequences over one cache: the workload driver of measurements. Not a server."""

from kvlab.serve.clock import StepClock, WallClock
from kvlab.serve.engine import engine as engine_of
from kvlab.serve.job import Job, Limits, Served
from kvlab.serve.loop import Loop
from kvlab.serve.requests import (
    BookChats,
    Request,
    TraceRequests,
    as_trace,
    several,
    with_cancellations,
    with_rate,
)
from kvlab.serve.ttft import TtftModel

__all__ = [
    "BookChats", "Job", "Limits", "Loop", "Request", "Served", "StepClock", "TraceRequests",
    "TtftModel", "WallClock", "as_trace", "engine_of", "several", "with_cancellations", "with_rate",
]  # fmt: skip
