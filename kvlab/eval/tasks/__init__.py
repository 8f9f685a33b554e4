"""Tasks that the field knows, drawn from a seed and judged as their authors judge.

`TASKS`: short name -> class, for lists of tasks; each has a yaml of that name in `conf/task`.
"""

from kvlab.eval.tasks.documents import Documents, Hotpot, Squad
from kvlab.eval.tasks.drawn import Drawn
from kvlab.eval.tasks.lists import CommonWords, FrequentWords, VariableTracking
from kvlab.eval.tasks.niah import (
    Niah,
    NiahMultikey1,
    NiahMultikey2,
    NiahMultikey3,
    NiahMultiquery,
    NiahMultivalue,
    NiahSingle1,
    NiahSingle2,
    NiahSingle3,
)
from kvlab.eval.tasks.protocol import Protocol
from kvlab.eval.tasks.wording import Asked, Prompt, Wording

RULER = (
    NiahSingle1, NiahSingle2, NiahSingle3, NiahMultikey1, NiahMultikey2, NiahMultikey3,
    NiahMultivalue, NiahMultiquery, VariableTracking, CommonWords, FrequentWords, Squad, Hotpot,
)  # fmt: skip
TASKS = {task.name: f"{task.__module__}.{task.__qualname__}" for task in RULER}

__all__ = [
    "RULER", "TASKS", "Asked", "CommonWords", "Documents", "Drawn", "FrequentWords", "Hotpot",
    "Niah", "NiahMultikey1", "NiahMultikey2", "NiahMultikey3", "NiahMultiquery",
    "NiahMultivalue", "NiahSingle1", "NiahSingle2", "NiahSingle3", "Prompt", "Protocol", "Squad",
    "VariableTracking", "Wording",
]  # fmt: skip
