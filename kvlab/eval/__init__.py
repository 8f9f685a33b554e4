"""Measures: tasks through every cache, paired with the full one; speed, serving, kernels."""

from kvlab.eval.asking import Asking, Forced
from kvlab.eval.bench import TASKS, Bench
from kvlab.eval.calibrate import Calibrate
from kvlab.eval.cost import TextCost
from kvlab.eval.endless import Endless
from kvlab.eval.jobs import Cost, Evaluate, Paired, Recall, Study
from kvlab.eval.lm_eval_job import LmEval
from kvlab.eval.load import Load
from kvlab.eval.pareto import Pareto
from kvlab.eval.parity import Parity
from kvlab.eval.prefill_speed import PrefillSpeed
from kvlab.eval.prefix_ttft import PrefixTTFT
from kvlab.eval.recall import Needles
from kvlab.eval.roofline import KernelRoofline
from kvlab.eval.sensitivity import Sensitivity
from kvlab.eval.serving import PrefixHitRate
from kvlab.eval.serving_speed import ServingSpeed
from kvlab.eval.speed import DecodeSpeed
from kvlab.eval.task import Item, Question, StepTask, Task, TimedTask
from kvlab.eval.text_loss import BudgetLoss, TextLoss
from kvlab.eval.tuning import Tune

__all__ = [
    "TASKS", "Asking", "Bench", "BudgetLoss", "Calibrate", "Cost", "DecodeSpeed", "Endless",
    "Evaluate", "Forced", "Item", "KernelRoofline", "LmEval", "Load", "Needles", "Paired", "Pareto",
    "Parity", "PrefillSpeed", "PrefixHitRate", "PrefixTTFT", "Question", "Recall",
    "Sensitivity", "ServingSpeed", "StepTask", "Study", "Task", "TextCost", "TextLoss", "TimedTask",
    "Tune",
]  # fmt: skip
