"""Request traces replayed against policies; needs no torch.

trace = load_trace("conversation")
result = simulate(trace, policy="lru", capacity_blocks=10_000)
capacities, block_hits = hit_curve(trace)
"""

from kvlab.sim.costs import Calibration, CostModel, NoService
from kvlab.sim.curves import hit_curve, stack_distances, weighted_curve
from kvlab.sim.definitions import Definitions
from kvlab.sim.files import TraceStream, load_trace, load_traces, write_trace
from kvlab.sim.result import SimResult
from kvlab.sim.sessions import Sessions
from kvlab.sim.simulator import simulate
from kvlab.sim.sweeps import sweep
from kvlab.sim.tiers import Host, NoHost
from kvlab.sim.trace import Trace, from_requests

__all__ = [
    "Calibration", "CostModel", "Definitions", "Host", "NoHost", "NoService", "Sessions",
    "SimResult", "Trace", "TraceStream", "from_requests", "hit_curve", "load_trace",
    "load_traces", "simulate", "stack_distances", "sweep", "weighted_curve", "write_trace",
]  # fmt: skip
