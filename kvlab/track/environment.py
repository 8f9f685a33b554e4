"""Where a result comes from: commit, versions, device, command. Imports no torch.

Nothing private is written: no user or host name, and paths in the command are shortened (the
config keeps them whole).
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from kvlab import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "transformers", "datasets", "tokenizers", "safetensors", "triton"),
    *("numpy", "scipy", "numba", "hydra-core", "omegaconf", "pydantic"),
    *("wandb", "matplotlib", "xxhash"),
)

CASTS = {"fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8"}


def collect(device: str | None = None) -> dict:
    """The environment as plain data.

    `device` is the run's setting (`cpu`, `cuda`, `cuda:1`, `auto` or None). CUDA facts appear only
    where torch is loaded already: asking for them must not load it. Versions outside the tested
    ranges are also said once, on stderr.
    """
    say_untested()
    return {
        **revision(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": command(sys.argv),
        "device": device_facts(device),
        "formats": format_support(device),
        "python": platform.python_version(),
        "versions": versions(),
        "untested_versions": untested_versions(),
        "host": host_facts(),
    }


@functools.cache
def revision() -> dict:
    """Commit of kvlab's own checkout when first asked, whatever folder the user stands in.

    KVLAB_COMMIT speaks for a copy without .git (`-dirty` at its end is understood); an installation
    by pip from a repository recorded its commit itself. `dirty` counts changed files and new ones
    among code and config.
    """
    named = os.environ.get("KVLAB_COMMIT", "")
    if named:
        return {"commit": named.removesuffix("-dirty"), "dirty": named.endswith("-dirty")}
    commit = git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    if commit is None:
        return {"commit": installed_commit(), "dirty": None}
    changes = (git("status", "--porcelain") or "").splitlines()
    counted = [c for c in changes if c[:2] != "??" or c[3:].startswith(("kvlab/", "conf/"))]
    return {"commit": commit.strip(), "dirty": bool(counted)}


def git(*arguments: str) -> str | None:
    """Output of a git command in the checkout; None where git cannot answer."""
    line = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def installed_commit() -> str | None:
    """What pip noted when it installed from a repository (PEP 610)."""
    try:
        noted = json.loads(metadata.distribution("kvlab").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    return noted.get("vcs_info", {}).get("commit_id")


def command(argv: list[str]) -> str:
    """The command line, as a shell takes it again, without private folders."""
    program = Path(argv[0])
    inside = ROOT / "kvlab" in program.parents and program.name == "__main__.py"
    module = ".".join(program.relative_to(ROOT).parts[:-1]) if inside else ""
    start = f"python -m {module}" if module else program.name
    return " ".join([start, *(shlex.quote(shorten(argument)) for argument in argv[1:])])


def shorten(argument: str) -> str:
    """Absolute paths inside `argument`: relative to here or to home, else only their last part."""

    def short(match: re.Match) -> str:
        path = Path(match[0])
        for folder, sign in ((Path.cwd(), ""), (Path.home(), "~/")):
            if folder != Path("/") and path.is_relative_to(folder):
                return f"{sign}{path.relative_to(folder)}"
        return f".../{path.name}"

    return re.sub(r"(?<![\w/:.~])/[^\s,;:'\"\[\]{}=]+", short, argument)


@functools.cache
def versions() -> dict:
    found = {"kvlab": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def untested_versions() -> dict[str, str]:
    """Installed packages outside the ranges that kvlab's own metadata admits, with their versions.

    The bounds of a range are what the tests ran with. Empty where kvlab is not installed: then
    nothing states a range.
    """
    return {name: found for name, found, admitted in _required() if found not in admitted}


def _required():
    """Name, installed version and admitted versions of each package that kvlab requires."""
    try:
        stated = metadata.requires("kvlab") or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, stated):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        requirement.specifier.prereleases = True  # one of an admitted release is no other version
        yield requirement.name, found, requirement.specifier


@functools.cache
def say_untested() -> None:
    """One line on stderr where a version outside the tested ranges runs."""
    admitted = {name: specifier for name, _, specifier in _required()}
    told = [f"{n} {v} (tested: {admitted[n]})" for n, v in untested_versions().items()]
    if told:
        print(f"kvlab: not tested with {', '.join(told)}", file=sys.stderr)


def device_facts(device: str | None = None) -> dict:
    """What the run computes on: kind and name, for CUDA also memory, capability and library."""
    torch = sys.modules.get("torch")
    usable = torch is not None and hasattr(torch, "cuda") and torch.cuda.is_available()
    if str(device or "auto").startswith("cpu") or not usable:
        return {"kind": "cpu", "name": cpu_name(), "threads": _threads(torch)}
    index = int(str(device).partition(":")[2] or torch.cuda.current_device())
    facts = torch.cuda.get_device_properties(index)
    return {
        "kind": "cuda",
        "name": facts.name,
        "memory_bytes": facts.total_memory,
        "capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
    }


def _threads(torch) -> int | None:
    """Of one operator: torch's own number where it is loaded, which OMP_NUM_THREADS sets, else all
    there are."""
    asked = getattr(torch, "get_num_threads", os.cpu_count)
    return asked()


def format_support(device: str | None = None) -> dict:
    """Which storage formats run here, found by trying: `torch` by plain tensors, `kernels` by the
    Triton kernels where a job has loaded them (see kvlab/kernel/probe_triton.py)."""
    torch, kernels = (sys.modules.get(name) for name in ("torch", "kvlab.kernel.probe_triton"))
    if torch is None or not hasattr(torch, "ones"):
        return {}
    where = "cpu" if device_facts(device)["kind"] == "cpu" else str(device or "cuda")
    where = torch.device("cuda" if where == "auto" else where)
    found = {"torch": {name: _cast(torch, name, where) for name in CASTS}}
    return found if kernels is None else found | {"kernels": kernels.support(where)}


def _cast(torch, name: str, where) -> str:
    """`native`, or `converted` where values are stored so but computed in another type."""
    dtype = getattr(torch, CASTS[name], None)
    if dtype is None:
        return "no: this torch has no such type"
    try:
        x = torch.ones(16, device=where).to(dtype)
        if not (x.float() == 1).all():
            return "no: wrong values"
    except (RuntimeError, TypeError) as error:
        return f"no: {str(error).splitlines()[0][:120]}"
    try:
        return "native" if bool((x + x).float().eq(2).all()) else "no: wrong sums"
    except (RuntimeError, TypeError):
        return "converted"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def host_facts() -> dict:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = None
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "load_average": load_average(),
        "clock_mhz": clock_mhz(),
    }


def load_average() -> float | None:
    """Processes that wanted to run in the last minute, before this run began; None where the
    system does not tell. More than half the cores: speeds are not to be believed."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def clock_mhz() -> float | None:
    """The processor's clock, a mean over cores at this moment; None where it is not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    told = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return round(sum(told) / len(told), 1) if told else None
