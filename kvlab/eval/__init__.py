"""Measures: quality paired with the full cache, recall, bytes and time, serving."""

from kvlab.eval.calibrate import Calibrate
from kvlab.eval.evaluate import Cost, Evaluate
from kvlab.eval.load import Load
from kvlab.eval.paired import Paired
from kvlab.eval.pareto import Pareto
from kvlab.eval.parity import Parity
from kvlab.eval.prefill_speed import PrefillSpeed
from kvlab.eval.prefix_ttft import PrefixTTFT
from kvlab.eval.recall import Recall
from kvlab.eval.roofline import KernelRoofline
from kvlab.eval.serving import PrefixHitRate
from kvlab.eval.speed import DecodeSpeed
from kvlab.eval.study import Study
from kvlab.eval.tuning import Tune

__all__ = [
    "Calibrate", "Cost", "DecodeSpeed", "Evaluate", "KernelRoofline", "Load", "Paired", "Pareto",
    "Parity", "PrefillSpeed", "PrefixHitRate", "PrefixTTFT", "Recall", "Study", "Tune",
]  # fmt: skip
