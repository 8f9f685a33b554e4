"""One job for all tasks: loading, baselines, controls, resume, failures, progress, rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import product

from kvlab.core import BadInput, Variant
from kvlab.eval.round import Round
from kvlab.eval.rows import awaited_last
from kvlab.eval.runner import Runner, alive, done
from kvlab.eval.setting import Setting
from kvlab.eval.task import Item, Task
from kvlab.eval.tasks import TASKS as GENERATED
from kvlab.model import LoadedModel
from kvlab.model.progress import shown

# Short names of tasks, for lists: name -> class. A task from elsewhere is named by its path.
TASKS = {
    "text_loss": "kvlab.eval.text_loss.TextLoss",
    "budget_loss": "kvlab.eval.text_loss.BudgetLoss",
    "needles": "kvlab.eval.recall.Needles",
    "text_cost": "kvlab.eval.cost.TextCost",
    **GENERATED,
}


class Bench:
    """Every variant through every task, paired by item with the full cache.

    model, data: a loader and a source of documents.
    tasks: what is measured, in order: tasks, short names (`kvlab.eval.TASKS`), dotted paths of
        classes (`my_module.MyTask`, with their defaults), or for one task itself.
    chunk_tokens: tokens of a prefill chunk, or `adaptive`: as many as the memory that is free at
        the start carries; with a lossy format part of the method.
    baseline: format of the full cache that everything is compared with.
    controls: add the negative controls of every variant that evicts, see `kvlab.eval.controls`.
    progress: a bar on a terminal, a line now and then in a log.
    device, cap_gb, seed: see `prepare_device`; the seed is the items' and the bootstrap's.

    A run that is started again on its folder measures what is missing there.
    """

    wants_specs = True

    def __init__(
        self, model, tasks, data=None, chunk_tokens: int | str = 512, baseline: str = "bf16",
        controls: bool = True, progress: bool = True, device: str = "auto",
        cap_gb: float | None = None, seed: int = 0,
    ):
        self.data, self.progress, self.seed = data, progress, seed
        self.tasks = [find(task) for task in listed(tasks)]
        if not self.tasks or any(task.name == Task.name for task in self.tasks):
            told = [type(task).__name__ for task in self.tasks]
            raise BadInput("tasks", told, "has nothing to measure, or no `name`; choose task=NAME "
                           f"or task=[...] of {', '.join(TASKS)} and of your own classes by path")
        self.setting = Setting(model, chunk_tokens, baseline, controls, device, cap_gb)

    def run(self, folder, variants: list[Variant]) -> None:
        """Measure what `folder` does not hold yet."""
        loaded = self.setting.load()
        parts = [part for task in self.tasks for part in task.parts(loaded)]
        # every refusal comes before anything is written
        failed, everyone = set(), [self.runners(loaded, part, variants) for part in parts]
        for part, runners in zip(parts, everyone):
            if part.timed:
                self.time(folder, part, [r for r in runners if r.name not in failed], loaded)
            elif not all(done(folder, r, part.awaited) for r in runners):
                self.pair(folder, part, runners, loaded)
                failed |= {r.name for r in runners if r.failure is not None}

    def runners(self, loaded: LoadedModel, task: Task, variants: list[Variant]) -> list[Runner]:
        """Who goes through a task: for one that is timed no control, and where nothing is paired
        in the whole run no baseline."""
        if not any(t.quality for t in self.tasks):
            return self.setting.plain(loaded, variants, task.params())
        found = self.setting.runners(loaded, variants, task.params())
        if task.timed:
            return [r for r in found if not r.is_control]
        return [found[0], *task.beside(found[0]), *found[1:]]

    def pair(self, folder, task: Task, runners: list[Runner], loaded: LoadedModel) -> None:
        """A task whose rows are paired with the full cache, `runners[0]`."""
        items = list(task.items(loaded, self.data, self.seed))
        if not items:
            raise BadInput("task", task.name, "has no items; its settings or the data leave none")
        Round(folder, task, runners, items, self.seed, self.progress).run()

    def time(self, folder, task: Task, runners: list[Runner], loaded: LoadedModel) -> None:
        """A task that measures each cache for itself."""
        if all(done(folder, r, task.awaited) for r in runners):
            return
        pairs = list(product(task.items(loaded, self.data, self.seed), alive(runners)))
        total, past = sum(len(item.context) for item, _ in pairs), 0
        with shown(self.progress, total, task.name) as show:
            for item, runner in pairs:
                self._time(folder, task, runner, item)
                past += len(item.context)
                show(past)

    def _time(self, folder, task: Task, runner: Runner, item: Item) -> None:
        params = runner.params | dict(item.params)
        if folder.done(runner.name, params, [task.awaited]):
            return
        alone = Runner(runner.name, params, runner.spec, loaded=runner.loaded,
                       chunk_tokens=runner.chunk_tokens)
        with folder.surviving(runner.name, params, task.awaited):
            rows = list(task.measure(alone, item))
            folder.add(runner.name, params, awaited_last(rows, task.awaited))


def listed(tasks) -> list:
    """One task, or a list of them, as a list."""
    one = isinstance(tasks, (str, Task, type)) or not isinstance(tasks, Sequence)
    return [tasks] if one else list(tasks)


def find(task) -> Task:
    """A task by its short name, the dotted path of its class, its class, or itself.

    Raises `BadInput` for what is none.
    """
    if isinstance(task, str):
        path = TASKS.get(task, task)
        module, _, name = path.rpartition(".")
        if not module:
            raise BadInput("tasks", task, f"known: {', '.join(TASKS)}; or a class of yours by its "
                           "dotted path, my_module.MyTask")
        try:
            task = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise BadInput("tasks", path, f"cannot be imported: {error}") from error
    if isinstance(task, type) and issubclass(task, Task):
        task = task()
    if not isinstance(task, Task):
        told = dict(task) if isinstance(task, Mapping) else task
        raise BadInput("tasks", told, "is no kvlab.eval.Task, and no name of one")
    return task
