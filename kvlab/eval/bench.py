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
from kvlab.eval.task import Item, StepTask, Task
from kvlab.eval.tasks import TASKS as GENERATED
from kvlab.model import LoadedModel
from kvlab.progress import Open, Work, total

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
        run_all([self], folder, variants)

    def stages(self, folder, variants: list[Variant], loaded: LoadedModel) -> list[Round | Timing]:
        """What is left to be measured, each task at each setting; refusals come here, before
        anything is written."""
        parts = [part for task in self.tasks for part in task.parts(loaded)]
        everyone = [self.runners(loaded, part, variants) for part in parts]
        found, before = [], []
        for part, runners in zip(parts, everyone):
            if all(done(folder, r, part.awaited) for r in runners):
                continue
            make = self.timing if part.timed else self.round
            found.append(make(folder, part, runners, loaded))
            if part.timed:
                found[-1].before = list(before)
            else:
                before += runners
        return found

    def runners(self, loaded: LoadedModel, task: Task, variants: list[Variant]) -> list[Runner]:
        """Who goes through a task: for one that is timed no control, and where nothing is paired
        in the whole run no baseline."""
        if not any(t.quality for t in self.tasks):
            return self.setting.plain(loaded, variants, task.params())
        found = self.setting.runners(loaded, variants, task.params())
        if task.timed:
            return [r for r in found if not r.is_control]
        return [found[0], *task.beside(found[0]), *found[1:]]

    def round(self, folder, task: Task, runners: list[Runner], loaded: LoadedModel) -> Round:
        """A task whose rows are paired with the full cache, `runners[0]`."""
        items = list(task.items(loaded, self.data, self.seed))
        if not items:
            raise BadInput("task", task.name, "has no items; its settings or the data leave none")
        if isinstance(task, StepTask):
            task.check(items, self.setting.chunk_tokens)
        return Round(folder, task, runners, items, self.seed)

    def timing(self, folder, task: Task, runners: list[Runner], loaded: LoadedModel) -> Timing:
        """A task that measures each cache for itself."""
        return Timing(folder, task, list(product(task.items(loaded, self.data, self.seed),
                                                 alive(runners))))  # fmt: skip


class Timing:
    """One task that measures each cache for itself, item by item.

    before: runners whose name is left out here if they failed in an earlier task.
    """

    def __init__(self, folder, task: Task, pairs: Sequence[tuple[Item, Runner]]):
        self.folder, self.task, self.before = folder, task, []
        self.pairs = [(item, runner) for item, runner in pairs if not folder.done(
            runner.name, runner.params | dict(item.params), [task.awaited])]

    def plan(self, work: Work) -> None:
        """Tell what is missing."""
        for item, runner in self.pairs:
            work.plan(self.task.part, runner.name, self._amounts(item, runner))

    def run(self, bar: Open) -> None:
        """Measure what is missing; `bar` has heard the plan."""
        failed = {runner.name for runner in self.before if runner.failure is not None}
        for item, runner in self.pairs:
            if runner.name not in failed:
                self._time(runner, item)
                bar.work.spread(self.task.part, runner.name, self._amounts(item, runner))
                bar.show()

    def _amounts(self, item: Item, runner: Runner) -> dict[str, float]:
        return self.task.amounts(item, runner.chunk_tokens)

    def _time(self, runner: Runner, item: Item) -> None:
        task, params = self.task, runner.params | dict(item.params)
        alone = Runner(runner.name, params, runner.spec, loaded=runner.loaded,
                       chunk_tokens=runner.chunk_tokens)
        with self.folder.surviving(runner.name, params, task.awaited):
            rows = list(task.measure(alone, item))
            self.folder.add(runner.name, params, awaited_last(rows, task.awaited))


def run_all(benches: Sequence[Bench], folder, variants: list[Variant]) -> None:
    """One model loaded and one bar for all of these, which share it; the first says the setting."""
    if not benches:
        return
    loaded = benches[0].setting.load()
    for bench in benches[1:]:
        bench.setting.chunk_tokens = benches[0].setting.chunk_tokens
    measure_all([stage for bench in benches for stage in bench.stages(folder, variants, loaded)],
                benches[0].progress)  # fmt: skip


def measure_all(stages: Sequence[Round | Timing], progress: bool) -> None:
    """All that is planned, in order, under one bar."""
    with total(progress, "kvlab") as bar:
        for stage in stages:
            stage.plan(bar.work)
        for stage in stages:
            stage.run(bar)


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
