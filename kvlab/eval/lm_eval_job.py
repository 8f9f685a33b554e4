"""A job: tasks of lm-evaluation-harness through every variant, paired with the full cache."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kvlab import stats
from kvlab.core import BadInput, Measurement, Variant
from kvlab.eval.rows import interval
from kvlab.eval.runner import Runner
from kvlab.eval.setting import Setting

Z = 1.96  # of the harness's standard errors
LAST = "lm_eval_samples"  # the row that a task has which is through


class LmEval:
    """tasks: names of the harness. include: a folder with yamls of tasks of your own.

    fewshot: examples in front of a question; null is the task's own number. limit: questions of
    each task; null: all. chat: whether through the model's chat template. batch_size: see
    `KvlabLM`. The rest: see `Bench`.
    """

    wants_specs = True

    def __init__(
        self, model, tasks: Sequence[str] = (), include: str | None = None,
        fewshot: int | None = None, limit: int | None = None, chat: bool = False,
        batch_size: int = 8, chunk_tokens: int = 512, baseline: str = "bf16",
        controls: bool = True, device: str = "auto", cap_gb: float | None = None, seed: int = 0,
    ):
        if not tasks:
            raise BadInput("job.tasks", [], "name tasks of lm-evaluation-harness: "
                           "job.tasks=[arc_easy,lambada_openai]")
        if include is not None and not Path(include).expanduser().is_dir():
            raise BadInput("job.include", include, "no such folder")
        self.tasks, self.include, self.fewshot = list(tasks), include, fewshot
        self.limit, self.chat, self.batch_size, self.seed = limit, chat, batch_size, seed
        self.setting = Setting(model, chunk_tokens, baseline, controls, device, cap_gb)

    def run(self, folder, variants: list[Variant]) -> None:
        """Measure what `folder` does not hold; samples of the full cache are kept beside it."""
        importlib.import_module("kvlab.eval.harness")  # refused before anything is written
        loaded = self.setting.load()
        about = {"fewshot": self.fewshot, "limit": self.limit, "chat": self.chat}
        runners = self.setting.runners(loaded, variants, about)
        for task in self.tasks:
            theirs = None
            for runner in runners:
                params = runner.params | {"task": task}
                is_full, done = runner is runners[0], folder.done(runner.name, params, [LAST])
                if done and not is_full:
                    continue
                with folder.surviving(runner.name, params, LAST):
                    found = self._evaluated(runner, task)
                    own = found["samples"][task]
                    theirs = own if is_full else theirs
                    if not done:
                        rows = [*scores(found["results"][task]), *self._paired(own, theirs),
                                Measurement(LAST, len(own), "", None, count=len(own))]
                        folder.add(runner.name, params, rows)

    def _evaluated(self, runner: Runner, task: str) -> dict:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        KvlabLM = importlib.import_module("kvlab.eval.harness").KvlabLM
        manager = TaskManager(include_path=self.include and str(Path(self.include).expanduser()))
        if task not in manager.all_tasks:
            raise BadInput("job.tasks", task, "is no task of lm-evaluation-harness; "
                           "`lm_eval --tasks list` lists them")
        model = KvlabLM(runner.loaded, runner.spec, runner.chunk_tokens, self.batch_size)
        return simple_evaluate(
            model, tasks=[task], num_fewshot=self.fewshot, limit=self.limit, task_manager=manager,
            apply_chat_template=self.chat, log_samples=True, bootstrap_iters=0,
            random_seed=self.seed, numpy_random_seed=self.seed, torch_random_seed=self.seed,
            fewshot_random_seed=self.seed,
        )

    def _paired(self, own: list[dict], theirs: list[dict] | None) -> Iterator[Measurement]:
        """The difference to the full cache, sample by sample, of each metric that samples have."""
        if not theirs or own is theirs:
            return
        for name in own[0]["metrics"]:
            gaps = [a[name] - b[name] for a, b in zip(own, theirs)
                    if isinstance(a.get(name), (int, float))]  # fmt: skip
            if gaps:
                gap = stats.mean_interval([np.array(gaps, dtype=float)], block=1, seed=self.seed)
                yield interval(f"{name}_minus_full", gap, "", None, len(gaps))


def scores(results: dict) -> Iterator[Measurement]:
    """Metrics as the harness names them, without its filter's name where there is one filter."""
    for key, value in results.items():
        name, _, which = key.partition(",")
        if which and not name.endswith("_stderr") and isinstance(value, (int, float)):
            error = results.get(f"{name}_stderr,{which}")
            wide = Z * error if isinstance(error, (int, float)) else None
            low, high = (None, None) if wide is None else (value - wide, value + wide)
            told = name if which == "none" else f"{name}_{which.replace('-', '_')}"
            yield Measurement(told, float(value), "", None, low, high)
