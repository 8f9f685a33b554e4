"""Results files -> Run: what was measured, where, and with which files beside it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from kvlab.core import BadInput
from kvlab.track import read_rows, standing

OF_RUN = ("run", "commit", "device")  # what results.jsonl adds to params
CURVE = "per_position"


@dataclass
class Run:
    """One run's rows with its origin.

    curves: the arrays of per_position.npz, {} where there is none.
    label: what tells it from the other runs of a report.
    weights: `random`, `reference` (the bundled model) or "" for any other.
    data: the text that was read, "" where that is not known.
    """

    name: str
    rows: list[dict]
    environment: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    label: str = ""
    weights: str = ""
    data: str = ""

    @property
    def device(self) -> str:
        device = self.environment.get("device") or {}
        return device.get("name", "unknown") if isinstance(device, dict) else str(device)

    @property
    def on_cpu(self) -> bool:
        device = self.environment.get("device")
        return isinstance(device, dict) and device.get("kind") == "cpu"

    @property
    def loaded(self) -> bool:
        """Whether others wanted more than half of the machine when the run began: no speed of it
        is to be believed. Of a GPU's run the same: its launches wait for the processor."""
        host = self.environment.get("host") or {}
        load, cores = host.get("load_average"), host.get("cores")
        return bool(load and cores and load > cores / 2)

    @property
    def commit(self) -> str:
        """Short commit, `(dirty)` where the code differed from it."""
        commit = str(self.environment.get("commit") or "unknown")[:12]
        return f"{commit} (dirty)" if self.environment.get("dirty") else commit


def load(paths: list[str | Path]) -> list[Run]:
    """Runs of run folders, of a sweep's folder, or of a report's results.jsonl.

    Names are unique afterwards, and labels say in what the runs differ. Raises BadInput for a path
    that holds no measurement.
    """
    runs = [run for path in paths for run in _load(Path(path))]
    if not runs:
        raise BadInput("run", "", "name at least one run folder")
    taken: dict[str, int] = {}
    for run in runs:
        taken[run.name] = taken.get(run.name, 0) + 1
        if taken[run.name] > 1:
            run.name = f"{run.name} ({taken[run.name]})"
    _label(runs)
    return runs


def _load(path: Path) -> list[Run]:
    if not path.exists():
        raise BadInput("run", path, "does not exist; name a run folder")
    if path.is_file() or (path / "results.jsonl").is_file():
        return _published(path if path.is_file() else path / "results.jsonl")
    if (path / "measurements.jsonl").is_file():
        return [_folder(path)]
    jobs = sorted(path.glob("*/measurements.jsonl"), key=lambda p: _natural(p.parent.name))
    if not jobs:
        raise BadInput("run", path, "holds no measurements.jsonl; name the folder of a run")
    return [_folder(job.parent, f"{_name(path)}/{job.parent.name}") for job in jobs]


def _folder(path: Path, name: str = "") -> Run:
    rows = _rows(path / "measurements.jsonl")
    environment = _plain(path / "environment.json", json.loads)
    config = _plain(path / "config.yaml", yaml.safe_load)
    curves = _curves(path / f"{CURVE}.npz")
    told = {"weights": _weights(config, rows), "data": _data(config, environment)}
    return Run(name or _name(path), rows, environment, config, curves, **told)


def _published(path: Path) -> list[Run]:
    """The runs of a report: rows by their `run`, origins from environments.json beside them."""
    origins = _plain(path.parent / "environments.json", json.loads)
    grouped: dict[str, list[dict]] = {}
    for row in _rows(path):
        grouped.setdefault(str(row["params"].get("run", _name(path.parent))), []).append(row)
    return [_republished(path.parent, name, rows, origins) for name, rows in grouped.items()]


def _republished(folder: Path, name: str, rows: list[dict], origins: dict) -> Run:
    first = rows[0]["params"]
    commit = str(first.get("commit") or "unknown")
    told = {
        "commit": commit.removesuffix("-dirty"),
        "dirty": commit.endswith("-dirty"),
        "device": {"name": first.get("device", "unknown")},
    }
    origin = dict(origins.get(name) or told)
    about = {key: origin.pop(key, "") for key in ("label", "weights", "data")}
    about["data"] = about["data"] or _data({}, origin)
    for row in rows:
        row["params"] = {k: v for k, v in row["params"].items() if k not in OF_RUN}
    return Run(name, rows, origin, curves=_curves(folder / curve_file(name)), **about)


def _weights(config: dict, rows: list[dict]) -> str:
    if rows and all("trace" in row["params"] for row in rows):
        return ""  # replayed requests: the model that the configuration names was not used
    model = config.get("model")
    model = model if isinstance(model, dict) else {"name": model}
    told = {str(model.get(key, "")) for key in ("_target_", "name")}
    told |= {str(row["params"].get("model", "")) for row in rows}
    if any(row["params"].get("random_weights") for row in rows):
        return "random"
    for kind, pattern in (("random", "random"), ("reference", "reference|outlier")):
        if any(re.search(pattern, name, re.I) for name in told):
            return kind
    return ""


def _data(config: dict, environment: dict) -> str:
    """What text was read: by the run's configuration, else by what a report kept of it, else by
    its command, where books are the default."""
    told = config.get("data")
    if isinstance(told, dict):
        kind = str(told.get("_target_", "")).rpartition(".")[2]
        named = told.get("name") or told.get("path")
        return "held-out books" if kind == "Books" else str(named or kind)
    command = str(environment.get("command", ""))
    named = re.search(r"\bdata(?:\.\w+)?=(\S+)", command)
    if "-m kvlab" not in command:
        return ""
    return named[1] if named else "held-out books"


def curve_file(run: str) -> str:
    """The file of a run's curves inside a report."""
    return f"{CURVE}-{re.sub(r'[^A-Za-z0-9.-]+', '-', run)}.npz"


def _rows(path: Path) -> list[dict]:
    try:
        rows, _ = read_rows(path)
    except OSError as error:
        raise BadInput("run", path, f"cannot be read ({error.strerror})") from None
    if not rows:
        raise BadInput("run", path, "holds no measurement yet; let the run finish its first one")
    return standing(rows)


def _plain(path: Path, parse) -> dict:
    """A file that describes the run; a missing one says nothing, a broken one is refused."""
    if not path.is_file():
        return {}
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, OSError):
        raise BadInput("run", path, "cannot be read; restore or remove the file") from None
    return found if isinstance(found, dict) else {}


def _curves(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        with np.load(path) as file:
            found = {key: file[key] for key in file.files}
        shape = (len(found["variants"]), len(found["position"]))
        whole = all(found[key].shape == shape for key in ("nll_delta", "low", "high"))
    except Exception:  # a broken archive raises any of numpy's, zipfile's and zlib's errors
        whole = False
    if not whole:
        raise BadInput("run", path, "needs position [P], variants [V], nll_delta, low, high [V, P]")
    return found


def _name(path: Path) -> str:
    """The folder's name; with the one above where it is a time of day, as Hydra names folders."""
    path = path.resolve()
    return f"{path.parent.name} {path.name}" if re.fullmatch(r"[\d-]+", path.name) else path.name


def _natural(name: str) -> tuple:
    return (0, int(name), "") if name.isdigit() else (1, 0, name)


def _label(runs: list[Run]) -> None:
    """A sweep's runs are told apart by the settings in which they differ, others by their names."""
    flat = [_flatten(run.config) for run in runs]
    keys = sorted({key for one in flat for key in one})
    skip = ("hydra", "track", "resume", "variants")
    differ = [
        key
        for key in keys
        if key.split(".")[0] not in skip and len({str(one.get(key)) for one in flat}) > 1
    ]
    for run, one in zip(runs, flat):
        run.label = " ".join(dict.fromkeys(run.label.split()))  # one thing may be set twice
        if run.label:  # a report said it before
            continue
        told = (f"{key.rpartition('.')[2]}={one.get(key)}" for key in differ)
        said = " ".join(dict.fromkeys(told))
        run.label = said if 0 < len(differ) <= 3 and len(said) <= 40 else run.name
    if len({run.label for run in runs}) < len(runs):
        for run in runs:
            run.label = run.name


def _flatten(config: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        flat.update(_flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat
