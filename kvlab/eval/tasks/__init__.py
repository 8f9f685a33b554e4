"""Tasks that the field knows, drawn from a seed and judged as their authors judge.

`TASKS`: short name -> class, for lists of tasks; each has a yaml of that name in `conf/task`.
"""

from kvlab.eval.tasks.documents import Documents, Hotpot, Squad
from kvlab.eval.tasks.drawn import Drawn
from kvlab.eval.tasks.infinite import KvRetrieval, MathFind, NumberString, Passkey
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
from kvlab.eval.tasks.ruler import RULER, Ruler
from kvlab.eval.tasks.several import (
    ScbenchKv,
    ScbenchKvRequests,
    ScbenchPrefixSuffix,
    ScbenchPrefixSuffixRequests,
    ScbenchVt,
    ScbenchVtRequests,
    Several,
)
from kvlab.eval.tasks.wording import Asked, Prompt, Wording
from kvlab.eval.tasks.written import (
    CopyString,
    Countdown,
    PathTraversal,
    TableToText,
    Written,
)

GENERATED = (
    *RULER, Passkey, NumberString, KvRetrieval, MathFind,
    ScbenchKv, ScbenchVt, ScbenchPrefixSuffix,
    ScbenchKvRequests, ScbenchVtRequests, ScbenchPrefixSuffixRequests,
    Countdown, PathTraversal, TableToText, CopyString,
)  # fmt: skip
TASKS = {task.name: f"kvlab.eval.tasks.{task.__name__}" for task in (*GENERATED, Ruler)}

__all__ = [
    "GENERATED", "RULER", "TASKS", "Asked", "CommonWords", "CopyString", "Countdown", "Documents",
    "Drawn", "FrequentWords", "Hotpot", "KvRetrieval", "MathFind", "Niah", "NiahMultikey1",
    "NiahMultikey2", "NiahMultikey3", "NiahMultiquery", "NiahMultivalue", "NiahSingle1",
    "NiahSingle2", "NiahSingle3", "NumberString", "Passkey", "PathTraversal", "Prompt",
    "Protocol", "Ruler", "ScbenchKv", "ScbenchKvRequests", "ScbenchPrefixSuffix",
    "ScbenchPrefixSuffixRequests", "ScbenchVt", "ScbenchVtRequests", "Several", "Squad",
    "TableToText", "VariableTracking", "Wording", "Written",
]  # fmt: skip
