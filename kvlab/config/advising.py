"""`python -m kvlab advise model=... device.memory_gb=16 context=131072 [requests=8] [goal=...]`.

And `python -m kvlab pages [FOLDER]`, the front page of a folder of reports.
"""

from __future__ import annotations

from collections.abc import Sequence

import hydra

from kvlab import axes
from kvlab.config.paths import conf_dir
from kvlab.config.plan import built

SHAPES = {  # of the front page
    "Qwen3-0.6B": ["model=qwen3_0_6b_random"],
    "Qwen3-8B": ["model=qwen3_0_6b_random", "model.hidden_size=4096", "model.layers=36",
                 "model.query_heads=32", "model.kv_heads=8", "model.head_dim=128",
                 "model.mlp_size=12288", "model.tied_embeddings=false"],
}  # fmt: skip


def advice(words: Sequence[str], width: int = 100) -> str:
    """The answer in lines of about `width` columns. Raises `BadInput` for what cannot be asked.

    The room that answers needs torch, so it is imported when it is asked.
    """
    ask = axes.load("advise", "kvlab.advice.parse")(words)
    with hydra.initialize_config_dir(str(conf_dir()), job_name="kvlab", version_base="1.3"):
        model = built([*ask.model, "experiment=none"], "model")
    return axes.load("advise", "kvlab.advice.advise")(ask, model.config(), width)


def pages(words: Sequence[str]) -> str:
    """Writes the front page of the folder that `words` name and says where. Raises `BadInput` for a
    folder without reports."""
    write = axes.load("pages", "kvlab.advice.front.write_front")
    with hydra.initialize_config_dir(str(conf_dir()), job_name="kvlab", version_base="1.3"):
        made = {name: built([*told, "experiment=none"], "model") for name, told in SHAPES.items()}
    page = write(words, {name: model.config() for name, model in made.items()})
    return f"{page} and {page.with_name('index.html')}"
