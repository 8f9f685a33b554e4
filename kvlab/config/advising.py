"""`python -m kvlab advise model=... device.memory_gb=16 context=131072 [requests=8] [goal=...]`.

And `python -m kvlab pages [FOLDER]`, the front page of a folder of reports.
"""

from __future__ import annotations

from collections.abc import Sequence

import hydra

from kvlab import axes
from kvlab.config.paths import conf_dir
from kvlab.config.plan import built


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
    page = axes.load("pages", "kvlab.advice.front.write_front")(words)
    return f"{page} and {page.with_name('index.html')}"
