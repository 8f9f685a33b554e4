"""What a user can get wrong, and the paragraph each mistake gets: the table is the contract.

Every row: one paragraph on stderr that begins with `kvlab: `, exit status 2, nothing on disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvlab.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "kvlab" / "assets" / "reference"
CONF = str(ROOT / "tests" / "conf")

SMALL = ["model.layers=1", "model.hidden_size=64", "model.mlp_size=64", "model.vocabulary=8192"]
# id: (arguments, words that the paragraph must contain)
TABLE = {
    # -- options of the command line
    "unknown option": (["--frobnicate"], ["unrecognized arguments: --frobnicate", "--help"]),
    "option without its value": (["--config-dir"], ["expected one argument"]),
    "config folder missing": (["--config-dir", "/nowhere"], ["--config-dir=/nowhere", "no such"]),
    "config name missing": (["--config-name", "nope"], ["nope"]),
    # -- form of an override
    "no equals sign": (["int4"], ["argument=int4", "write key=value"]),
    "broken list": (["cache.size=[1"], ["argument=cache.size=[1", "write key=value"]),
    "space in the key": (["a b=c"], ["argument=a b=c", "write key=value"]),
    "stray key": (["+stray.key=1"], ["+stray.key=1", "no key can be added"]),
    "forced stray key": (["++stray.key=1"], ["+stray.key=1", "no key can be added"]),
    "deleted key": (["~cache.size"], ["~cache.size", "nothing can be left out"]),
    "several values in one run": (["format=int4,int8"], ["format=int4,int8", "--multirun"]),
    # -- options of a group
    "unknown option of a group": (["format=int5"], ["format=int5", "did you mean int8?", "known:"]),
    "unknown experiment": (["experiment=quickstrt"], ["experiment=quickstrt", "mean quickstart?"]),
    "unknown job": (["job=nope"], ["job=nope", "known:", "count_specs"]),
    "unknown tracker": (["track=wandbb"], ["track=wandbb", "did you mean wandb?"]),
    "number for a group": (["cache=3"], ["cache=3", "no such option", "default"]),
    "null for a group": (["track=null"], ["track=null", "no such option", "none"]),
    # -- keys
    "unknown group": (["formt=int4"], ["formt=int4", "did you mean format?"]),
    "unknown key": (["cache.siz=3"], ["cache.siz=3", "did you mean cache.size?"]),
    "unknown plain key": (["memory.cap=4"], ["memory.cap=4", "did you mean memory.cap_gb?"]),
    "key of another option": (["data.path=x"], ["data.path=x", "data=text does"]),
    "key behind an alias": (["spec.size=3"], ["spec.size=3", "set cache.size instead"]),
    "unknown key in a whole section": (["part={siz: 3}"], ["part=", "'siz' is not in struct"]),
    "unknown key of Hydra": (["hydra.run.dr=x"], ["hydra.run.dr=x", "'dr' not in 'RunDir'"]),
    "value for a section": (["format.key=3"], ["format.key=3", "must be a Codec"]),
    "cap that the job does not use": (["memory.cap_gb=4"], ["memory.cap_gb=4", "does not use it"]),
    "setting that the job does not use": (["model=local"], ["model=local", "does not use it"]),
    # -- types
    "text for a whole number": (["cache.size=abc"], ["cache.size=abc", "must be a whole number"]),
    "fraction for a whole number": (["cache.size=1.5"], ["cache.size=1.5", "a whole number"]),
    "truth for a whole number": (["cache.size=true"], ["cache.size=true", "a whole number"]),
    "nothing for a whole number": (["job.tokens=null"], ["job.tokens=null", "a whole number"]),
    "text for a number": (["part.share=x"], ["part.share=x", "a number or null"]),
    "none of the choices": (["part.kind=z"], ["part.kind=z", "one of a, b"]),
    "section for a number": (["job.tokens={a: 1}"], ["job.tokens="]),
    "seed": (["seed=x"], ["seed=x", "a whole number"]),
    "seed out of range": (["seed=-1"], ["seed=-1", "between 0 and"]),
    "device": (["device=gpu"], ["device=gpu", "one of auto, cpu, cuda"]),
    "resume": (["resume=maybe"], ["resume=maybe", "true or false"]),
    # -- variants
    "variants is no list": (["variants=3"], ["variants=3", "a list"]),
    "entry is no text": (["variants=[1]"], ["variants=[1]", "a text"]),
    "entry is no override": (["variants=['int4']"], ["argument=int4", "write key=value"]),
    "unknown option in a variant": (["variants=['format=int9']"], ["format=int9", "known:"]),
    "variant out of its reach": (["variants=['seed=3']"], ["variants: seed=3", "the cache"]),
    "bad value in a variant": (["variants=['cache.size=0']"], ["cache.size=0", "at least 1"]),
    # -- values and combinations
    "impossible value": (["part.size=0"], ["part.size=0", "must be at least 1"]),
    "impossible combination": (
        ["variants=['cache.size=13 cache.share=0.5']"],
        ["cache.share=0.5", "cannot be combined with cache.size=13"],
    ),
    "value must be given": (["job=count_data", "data=text"], ["data.path=???", "data.path=..."]),
    "class that is not there": (["job._target_=toys.Nope"], ["job._target_=toys.Nope", "imported"]),
    "module that is not there": (["job._target_=no.Such"], ["job._target_=no.Such", "imported"]),
    # -- files
    "run folder inside a file": (["hydra.run.dir=FILE/x"], ["hydra.run.dir=", "is a file"]),
    "run folder is a file": (["hydra.run.dir=FILE"], ["hydra.run.dir=", "is a file"]),
    "text file missing": (
        ["job=count_data", "data=text", "data.path=/nowhere.txt"],
        ["data.path=/nowhere.txt", "no such file"],
    ),
    "data too short": (
        ["job=count_data", "data=text", "data.path=FILE"],
        ["data.path=", "has 6 tokens", "lower eval.tokens"],
    ),
    "hub data without network": (["job=count_data", "data=pg19"], ["data.name=", "data=text"]),
    "checkpoint missing": (
        ["job=count_data", "model=local", "model.path=/nowhere"],
        ["model.path=/nowhere", "no such folder"],
    ),
    "checkpoint is a file": (
        ["job=count_data", "model=local", "model.path=FILE"],
        ["model.path=", "is not a folder"],
    ),
    "hub model without network": (
        ["job=count_data", "model=qwen3_0_6b"],
        ["model.name=Qwen/Qwen3-0.6B", "model.path=DIR"],
    ),
    "refused while running": (["job.fail=early"], ["model.path=x", "is broken"]),
}


# The same for the real job: what needs a model, its shape or its data to be found out.
WHOLE = {
    "block of no tokens": (["cache.block_size=0"], ["cache.block_size=0", "at least 1"]),
    "block too large": (["cache.block_size=257"], ["cache.block_size=257", "at most 256"]),
    "two budgets": (
        ["cache.budget_percent=10", "cache.budget_blocks=3"],
        ["cache.budget_percent=10", "cache.budget_blocks is given too"],
    ),
    "budget over all": (["cache.budget_percent=200"], ["cache.budget_percent=200", "at most 100"]),
    "budget below a block": (["cache.budget_bytes=10"], ["cache.budget_bytes=10", "one block"]),
    "chunk of no tokens": (["prefill.chunk_tokens=0"], ["prefill.chunk_tokens=0", "at least 1"]),
    "one token a document": (["eval.tokens=1"], ["eval.tokens=1", "at least 2"]),
    "more documents than there are": (["eval.documents=9"], ["data=books", "wanted: 9"]),
    "no such device": (["device=cuda"], ["device=cuda", "no CUDA device"]),
    "cap on the CPU": (["device=cpu", "memory.cap_gb=4"], ["memory.cap_gb=4", "needs CUDA"]),
    "model without its path": (["model=local"], ["model.path=???", "model.path=..."]),
    "checkpoint missing": (["model.path=/nowhere"], ["model.path=/nowhere", "no such folder"]),
    "pickled checkpoint": (["model.path=PICKLED"], ["model.path=", "only pickled weights"]),
    "truncated checkpoint": (["model.path=TRUNCATED"], ["model.path=", "truncated"]),
    "head too narrow to pack": (["model.path=NARROW", "format=int3"], ["36", "int3"]),
    "random weights": (["model=qwen3_0_6b_random", *SMALL], ["random"]),
    "policy that sees the future": (["policy=belady"], ["policy=belady", "future"]),
    "sinks below zero": (["window=sink", "window.sinks=-1"], ["window.sinks=-1", "at least 0"]),
    "trace for a live run": (["trace.path=x"], ["trace.path=x"]),
}


def refused(argv: list[str], capsys) -> str:
    """The paragraph that `argv` is refused with."""
    capsys.readouterr()  # what fixtures said
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("kvlab: ") and text.endswith("\n") and text.count("\n") == 1
    assert "Traceback" not in text and "hydra.cc" not in text
    return text


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_gets_its_paragraph(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("five tokens or so")
    given, words = TABLE[name]
    given = [argument.replace("FILE", str(tmp_path / "file.txt")) for argument in given]
    text = refused(["--config-dir", CONF, *defaults(given), *given], capsys)
    assert not [word for word in words if word not in text], text
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def defaults(given: list[str]) -> list[str]:
    """A run that works; `given` then breaks it."""
    sane = ["experiment=toy_specs", "hydra.run.dir=out/run"]
    return [s for s in sane if s.partition("=")[0] not in {g.partition("=")[0] for g in given}]


def test_the_run_that_the_table_breaks_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--config-dir", CONF, *defaults([])]) == 0


def test_typo_in_a_users_yaml_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment").mkdir()
    head = "# @package _global_\ndefaults:\n  - /part: small\n  - override /job: count\n"
    for line, words in {
        "formatt: int4": "formatt=int4: no such key; did you mean format?",
        "memory: {cap: 4}": "memory.cap=4: no such key; did you mean cap_gb?",
        "job: {token: 4}": "job.token=4: no such setting; did you mean tokens?",
    }.items():
        (tmp_path / "experiment" / "mine.yaml").write_text(head + line)
        conf = ["--config-dir", str(tmp_path), f"hydra.searchpath=['file://{CONF}']"]
        assert words in refused([*conf, "experiment=mine"], capsys)


@pytest.mark.parametrize("name", WHOLE)
def test_bad_input_of_a_whole_run(name, capsys, tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    given, words = WHOLE[name]
    if name == "no such device":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    damaged = {a.partition("=")[2] for a in given} & {"PICKLED", "TRUNCATED", "NARROW"}
    for kind in damaged:
        path = str(damaged_checkpoint(tmp_path, kind, tiny_model))
        given = [argument.replace(kind, path) for argument in given]
    sane = ["track=none", "eval.tokens=128", "eval.documents=1", "variants=[]"]
    keys = {argument.partition("=")[0] for argument in given}
    text = refused([*(s for s in sane if s.partition("=")[0] not in keys), *given], capsys)
    assert not [word for word in words if word not in text], text
    assert not (tmp_path / "outputs").exists()


def damaged_checkpoint(folder: Path, kind: str, tiny_model) -> Path:
    """A folder with a tiny model and what `kind` says is wrong with it."""
    path = folder / kind.lower()
    width = {"head_dim": 36} if kind == "NARROW" else {}
    tiny_model(vocab_size=8192, **width).save_pretrained(path)
    shutil.copy(REFERENCE / "tokenizer.json", path)
    weights = path / "model.safetensors"
    if kind == "PICKLED":
        weights.rename(path / "pytorch_model.bin")
    if kind == "TRUNCATED":
        weights.write_bytes(weights.read_bytes()[:-1])
    return path
