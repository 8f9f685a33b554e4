"""A search of the composed space for what no other composition beats in loss, bytes and speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from kvlab import axes
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, KvlabError, Variant
from kvlab.eval.bench import measure_all
from kvlab.eval.jobs import Evaluate
from kvlab.eval.runner import Runner
from kvlab.model import Driver, model_geometry
from kvlab.window import NoWindow, SinkWindow

OBJECTIVES = {
    "kl_mean_nats": "minimize",
    "cache_logical_bytes": "minimize",
    "decode_tokens_per_second": "maximize",
}
# What a point of the space says: a member of each axis, but for the window in numbers (0 recent
# tokens: none), and what goes with a policy.
NAMED = [axis for axis in axes.AXES if axis != "window"]
NOTHING = {axis: axes.TABLE[axis].null for axis in NAMED if axis != "format"} | {"recent": 0}
SPACE = (*NAMED, "block_size", "budget_percent", "sinks", "recent")
JOURNAL = "study.journal"


class Pareto(Evaluate):
    """Compositions proposed by Optuna, each measured like a variant of `Evaluate`.

    space: choices for any of `SPACE`; what is left out keeps its default. Names as in `CacheSpec`.
    trials: compositions to measure, refused ones included. batch: of them, measured in lockstep
        with one run of the full cache.
    sampler: "nsga2" (Deb et al. 2002, https://doi.org/10.1109/4235.996017) or "tpe" (its
        multi-objective form, https://doi.org/10.1145/3377930.3389817).
    The first trials are the formats alone. The study lies in the run folder as a journal, so that
    `resume=true` goes on with it. The other arguments are those of `Evaluate`; there are no
    controls. Raises `BadInput` where Optuna is not installed.
    """

    wants_specs = False

    def __init__(
        self, model, data, space: dict, trials: int = 64, batch: int = 8,
        sampler: Literal["nsga2", "tpe"] = "nsga2", documents: int | None = 2, tokens: int = 4096,
        decode_tokens: int | None = None, chunk_tokens: int | str = 512, baseline: str = "bf16",
        progress: bool = True, device: str = "auto", cap_gb: float | None = None, seed: int = 0,
        driver: Driver = "auto", decode_driver: Driver = "auto",
    ):
        super().__init__(
            model, data, documents, tokens, decode_tokens, chunk_tokens, baseline, False, False,
            progress, device, cap_gb, seed, driver, decode_driver,
        )
        if trials < 1 or not 1 <= batch <= 64:
            raise BadInput("trials", trials, "must be at least 1, and batch 1 to 64")
        if decode_tokens is not None and decode_tokens < 1:
            raise BadInput("eval.decode_tokens", decode_tokens, "must be at least 1: speed counts")
        unknown = [key for key in space if key not in SPACE]
        if unknown or not all(isinstance(c, Sequence) and c for c in space.values()):
            raise BadInput("space", unknown or space, f"give lists for any of {', '.join(SPACE)}")
        self.space, self.trials, self.batch, self.sampler = space, trials, batch, sampler

    def run(self, folder, variants: list[Variant]) -> None:
        """Go on until the study has `trials` trials."""
        if variants:
            raise BadInput("variants", [v.name for v in variants], "the search makes its own; "
                           "job.space says from what")
        optuna = _optuna()
        loaded = self.setting.load()
        self.tasks = [part for task in self.tasks for part in task.parts(loaded)]
        study = self._study(optuna, folder)
        again = _again(study, optuna)
        while (left := self.trials + again + _waiting(study, optuna) - len(study.trials)) > 0:
            asked = [study.ask() for _ in range(min(self.batch, left))]
            runners = self._composed(loaded, study, asked, optuna)
            self._measure(folder, loaded, list(runners.values()))
            values = _values(folder)
            for number, runner in runners.items():
                if runner.name in values:
                    study.tell(number, values[runner.name])
                else:  # its failure stands in the folder
                    study.tell(number, state=optuna.trial.TrialState.FAIL)

    def _study(self, optuna, folder):
        """The folder's study. Trials that a killed run left open, and those whose composition
        raised, are enqueued again in place of what they were."""
        backend = optuna.storages.journal.JournalFileBackend(str(folder.path / JOURNAL))
        study = optuna.create_study(
            study_name="pareto", directions=list(OBJECTIVES.values()), load_if_exists=True,
            storage=optuna.storages.JournalStorage(backend), sampler=None,
        )
        seed = self.seed + len(study.trials)  # the same seed would propose the same again
        samplers = optuna.samplers
        study.sampler = (
            samplers.NSGAIISampler(population_size=max(8, 2 * self.batch), seed=seed)
            if self.sampler == "nsga2" else samplers.TPESampler(seed=seed, multivariate=True)
        )
        if not study.trials:
            first = {key: choices[0] for key, choices in self.space.items()}
            for name in self.space.get("format", []):
                alone = {k: v for k, v in NOTHING.items() if v in self.space.get(k, ())}
                study.enqueue_trial(first | alone | {"format": name})
        failed = {row["variant"] for row in folder.failures()}
        for trial in _ended_early(study, optuna):
            if trial.params.keys() == self.space.keys() and composition(trial.params)[0] in failed:
                study.enqueue_trial(trial.params)
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if trial.params.keys() == self.space.keys():
                study.enqueue_trial(trial.params)
        return study

    def _composed(self, loaded, study, asked, optuna) -> dict[int, Runner]:
        """Trial number -> its runner; compositions that are refused fail and say why."""
        found = {}
        for trial in asked:
            chosen = {k: trial.suggest_categorical(k, list(c)) for k, c in self.space.items()}
            try:
                name, settings, spec = composition(chosen)
                spec.checked_for(model_geometry(loaded.model, spec))
                runner = self._runner(loaded, name, settings, spec)
            except KvlabError as error:
                trial.set_user_attr("refused", str(error))
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            else:
                found[trial.number] = runner
        return found

    def _runner(self, loaded, name: str, settings: dict, spec: CacheSpec) -> Runner:
        params = self.tasks[0].params() | {"search": self.sampler}
        return self.setting.runner(loaded, name, settings, spec, params)

    def _measure(self, folder, loaded, runners: list[Runner]) -> None:
        """Quality in step with the full cache, then each one's speed; each name once."""
        known = _values(folder)
        todo = {r.name: r for r in runners if r.name not in known}
        if not todo:
            return
        loss, cost = self.tasks
        [full] = self.setting.runners(loaded, [], loss.params())
        alone = [full] if full.name not in known else []
        paired = self.round(folder, loss, [full, *todo.values()], loaded)
        timed = self.timing(folder, cost, [*alone, *todo.values()], loaded)
        timed.before = list(todo.values())
        measure_all([paired, timed], self.progress)


def composition(chosen: dict) -> tuple[str, dict, CacheSpec]:
    """Readable name, settings and spec of one point of the space; what has no effect is left out.

    A policy comes with its budget, and then a window protects; without one the window alone decides
    what stays. Raises `BadInput` for what does not compose.
    """
    given = NOTHING | {"sinks": 4} | chosen
    evicts = given["policy"] != "none"
    if not evicts and not given["recent"]:  # nothing leaves that could be summarized
        given["summary"] = "none"
    window = NoWindow()
    if given["recent"]:
        window = SinkWindow(given["sinks"], given["recent"], middle=evicts)
    members = {key: given[key] for key in (*NAMED, "block_size") if key in given}
    settings = {k: v for k, v in members.items() if v != NOTHING.get(k)}
    if evicts:
        members["budget_percent"] = settings["cache.budget_percent"] = given["budget_percent"]
    if given["recent"]:
        settings |= {"window.sinks": given["sinks"], "window.recent": given["recent"]}
    words = [given.get("format", "bf16"), *([given["policy"], f"{given['budget_percent']}%"]
                                           if evicts else [])]  # fmt: skip
    words += [f"window {given['sinks']}+{given['recent']}"] if given["recent"] else []
    words += [given[axis] for axis in NOTHING if axis in members and axis != "policy"
              and given[axis] != NOTHING[axis]]
    words += [f"b{given['block_size']}"] if "block_size" in given else []
    return " ".join(words), settings, CacheSpec(window=window, **members)


def _values(folder) -> dict[str, list[float]]:
    """Variant -> its objectives, of variants that were measured in all of them."""
    found: dict[str, dict[str, float]] = {}
    for row in folder.rows():
        found.setdefault(row["variant"], {})[row["name"]] = row["value"]
    return {
        variant: [values[name] for name in OBJECTIVES]
        for variant, values in found.items() if OBJECTIVES.keys() <= values.keys()
    }


def _ended_early(study, optuna) -> list:
    """Trials that failed without being refused: killed, or their composition raised."""
    failed = study.get_trials(states=[optuna.trial.TrialState.FAIL])
    return [trial for trial in failed if "refused" not in trial.user_attrs]


def _again(study, optuna) -> int:
    """How many of them were before this start: each has another trial in its place."""
    return len(_ended_early(study, optuna))


def _waiting(study, optuna) -> int:
    return len(study.get_trials(states=[optuna.trial.TrialState.WAITING]))


def _optuna():
    try:
        import optuna
    except ImportError:
        raise BadInput("job", "pareto", "needs Optuna: pip install 'kvlab[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
