"""What the studies on real models are: which run as one, on which models, and what first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
# name in reports -> the words of a command line, and the file that `shared` weights come in
MODELS = {
    "smollm2-135m": ("model=smollm2_135m", "eval=books_8k", "smollm2-135m-instruct.gguf"),
    "qwen2.5-coder-0.5b": ("model=qwen2_5_coder_0_5b", "eval=books_32k",
                           "qwen2.5-coder-0.5b-instruct.gguf"),
}  # fmt: skip
SLOW = ("int3g", "k3v2g", "int2g", "k4v2g")  # formats whose sealing searches


@dataclass(frozen=True)
class Study:
    """experiment: of conf/experiment. words: of each part, which variants it takes by a word that
    they hold; a part takes what none before it took, "" takes the rest. seconds: of a part, as
    estimated from tokens: 4 x 32,768 or 8 x 8,192 read a variant, 256 decoded of each document."""

    report: str
    experiment: str
    words: tuple[str, ...] = ("",)
    seconds: int = 90
    changes: tuple[str, ...] = ()


BUDGETS = ("=50", "=25", "=10", "=5")
STUDIES = (  # the most important first
    Study("real_formats_long", "real_formats", ("k3v2g", "int2g", "int3g", ""), 150,
          ("eval.decode_tokens=null", "prefill.chunk_tokens=1024")),
    Study("real_axes", "real_axes", ("percent=50", "percent=25", "percent=10", ""), 120),
    Study("real_eviction", "real_eviction", BUDGETS, 150),
    Study("real_windows", "real_windows", ("rerotate", "sinks=", ""), 90),
    Study("real_retrieval", "real_retrieval", ("quest", ""), 120),
    Study("real_summaries", "real_summaries", ("percent=10", ""), 150),
    Study("real_outliers", "real_outliers", ("",), 100),
    Study("real_pareto", "real_pareto", ("",), 240),
)  # fmt: skip


def parts(study: Study) -> list[list[str] | None]:
    """The variants of each part; None: all that the experiment says."""
    if study.words == ("",):
        return [None]
    told = yaml.safe_load((ROOT / "conf/experiment" / f"{study.experiment}.yaml").read_text())
    left, found = list(told["variants"]), []
    for word in study.words:
        found.append([v for v in left if word in v])
        left = [v for v in left if v not in found[-1]]
    return found
