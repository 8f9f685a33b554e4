"""The wheel carries configuration and assets, and runs where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("build", reason="the `test` extra brings the build front end")
# With the back end installed no network is needed; else an isolated build fetches it.
ISOLATION = ["--no-isolation"] if find_spec("hatchling") else []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    line = [sys.executable, "-m", "build", "--wheel", *ISOLATION, "--outdir", str(out)]
    done = subprocess.run([*line, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [made] = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the package as pip would lay it down, and nothing of the checkout."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def python(*argv: str, site: Path, cwd: Path) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(site), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    line = [sys.executable, *argv]
    return subprocess.run(
        line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def test_wheel_carries_configuration_and_assets(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"kvlab/conf/{p.relative_to(ROOT / 'conf')}" for p in ROOT.glob("conf/**/*.yaml")}
    assets = {str(p.relative_to(ROOT)) for p in ROOT.glob("kvlab/assets/**/*") if p.is_file()}
    assert len(conf) > 20 and conf <= names
    assert any(name.endswith(".safetensors") for name in assets) and assets <= names


def test_wheel_carries_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0].partition("-")[0] for name in names}
    assert tops == {"kvlab"}
    assert not [name for name in names if "__pycache__" in name or "tests/" in name]


def test_installed_wheel_composes_its_own_configuration(installed, tmp_path):
    done = python("-m", "kvlab", "--cfg", "job", "format=int4", site=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = python("-m", "kvlab", "--info", "searchpath", site=installed, cwd=tmp_path)
    assert str(installed / "kvlab" / "conf") in done.stdout and str(ROOT) not in done.stdout


def test_installed_wheel_loads_its_model_and_books(installed, tmp_path):
    code = (
        "from kvlab.eval.data import Books\n"
        "from kvlab.model.load import REFERENCE, ReferenceModel\n"
        "tokenizer = ReferenceModel().load('cpu').tokenizer\n"
        "print(REFERENCE, len(Books().documents(tokenizer, 1, 64)[0].ids))"
    )
    done = python("-c", code, site=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "kvlab" / "assets" / "reference"), "64"]
