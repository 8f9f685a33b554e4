"""The house stands: rooms import lower floors only, and the left column knows no tensors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from walls import patches

ROOT = Path(__file__).resolve().parents[1] / "kvlab"
FLOORS = (
    ("core", "axes", "kinds"),
    ("policy", "window", "budget", "kernel", "track", "report", "stats", "hub",
     "progress", "launch"),
    ("blocks", "format", "summary", "retrieval"),
    ("sim", "fused"),
    ("pool", "offload"),
    ("source",),
    ("cache",),
    ("model",),
    ("serve",),
    ("eval", "advice"),
    ("config", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# kernels made for a format; the references lie below formats
FUSED = ("_triton", "_cuda", "sides", "tune")
NEIGHBOURS = {("axes", "core"), ("kinds", "core"), ("report", "track"), ("offload", "pool"),
              ("__main__", "config")}  # fmt: skip
TORCH_FREE = (
    "policy", "window", "budget", "blocks", "sim", "track", "report", "stats", "hub", "core",
    "axes", "kinds", "progress", "launch",
)  # fmt: skip
ONLY_IN = {
    "transformers": {"model"},
    "hydra": {"config", "__main__"},
    "omegaconf": {"config", "__main__"},
}
OPTIONAL = {"triton", "wandb", "numba", "joblib", "libcachesim", "ray", "optuna", "gguf",
            "lm_eval", "submitit", "wandb_workspaces"}
OPTIONAL_ROOMS = ("_triton",)  # modules of ours that need an optional library
# A second to import, and what most runs never need: a model from a folder, a trace of ids.
SLOW = {"huggingface_hub", "pyarrow", "tokenizers"}


class Import(NamedTuple):
    """`module` in full; `inside` a function or at the top of the file; `named` by a package, as in
    `from kvlab import hub`."""

    file: str
    line: int
    module: str
    inside: bool
    named: bool

    def __str__(self):
        return f"{self.file}:{self.line} imports {self.module}"


def room(dotted: str) -> str | None:
    """kvlab.sim.trace -> sim; None for kvlab itself and for anything else."""
    parts = dotted.split(".")
    if parts[0] != "kvlab" or len(parts) < 2 or parts[1] not in FLOOR:
        return None
    return "fused" if parts[1] == "kernel" and dotted.endswith(FUSED) else parts[1]


def imports_of(source: str, file: str) -> list[Import]:
    tree = ast.parse(source)
    deep = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(outer)
    }
    return [
        Import(file, node.lineno, module, id(node) in deep, named(node, module))
        for node in ast.walk(tree)
        for module in modules(node)
    ]


def named(node: ast.AST, module: str) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module != module


def modules(node: ast.AST) -> Iterator[str]:
    """What a statement imports: `from kvlab import hub` is kvlab.hub, a class is its module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "relative imports hide the floor they come from"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from {name if is_module(name) else node.module for name in names}


def is_module(dotted: str) -> bool:
    path = ROOT.parent.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


FILES = sorted(ROOT.rglob("*.py"))
HOUSE = {
    ".".join(("kvlab", *path.relative_to(ROOT).with_suffix("").parts)): imports_of(
        path.read_text(), str(path.relative_to(ROOT.parent))
    )
    for path in FILES
}
ALL = [(name, found) for name, imports in HOUSE.items() for found in imports]


def upward(name: str, found: Import) -> bool:
    """Whether module `name` may not import this: a higher floor, or another room of its own."""
    here, there = room(name), room(found.module)
    if here is None or there is None or here == there or (here, there) in NEIGHBOURS:
        return False
    return FLOOR[there] >= FLOOR[here]


def test_every_room_has_a_floor():
    rooms = {path.relative_to(ROOT).with_suffix("").parts[0] for path in FILES} - {"__init__"}
    assert rooms <= set(FLOOR)


def test_no_arrow_points_upwards():
    assert not [str(found) for name, found in ALL if upward(name, found)]


def test_an_upward_arrow_would_be_seen():
    (found,) = imports_of("from kvlab.cache import PagedCache", "pool.py")
    assert upward("kvlab.pool", found)
    (found,) = imports_of("from kvlab import hub", "policy/x.py")
    assert upward("kvlab.policy.x", found)
    (found,) = imports_of("from kvlab.format import KVFormat", "kernel/x.py")
    assert upward("kvlab.kernel.x_ref", found) and not upward("kvlab.kernel.x_triton", found)


def graph() -> dict[str, set[str]]:
    """Module -> modules of kvlab it imports while it is loaded; a package is its __init__."""
    known = {name.removesuffix(".__init__"): name for name in HOUSE}
    return {
        name: {known[f.module] for f in found if f.module in known and not f.inside} - {name}
        for name, found in HOUSE.items()
    }


def cycle(edges: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def walk(node, path):
        if node in path:
            return path[path.index(node) :] + [node]
        if node in done:
            return None
        done.add(node)
        return next(filter(None, (walk(n, [*path, node]) for n in sorted(edges[node]))), None)

    return next(filter(None, (walk(node, []) for node in sorted(edges))), None)


DEEP = Path(__file__).with_name("deep_imports.txt")
# kernel: an op is two functions of one name, told apart by module, and halves lie on two floors,
# so the package cannot import them.
DOORS = ("base",)
OF_MODULES = ("kernel", "fused")


def deep() -> set[tuple[str, str]]:
    """(room, module) where a room imports another's module that is neither its package nor base."""
    return {
        (str(room(name)), found.module)
        for name, found in ALL
        if room(found.module) not in (None, room(name), *OF_MODULES) and room(name)
        and found.module.count(".") > 1 and not found.module.endswith(DOORS)
        and not (found.named and exported(found.module))
    }  # fmt: skip


def exported(module: str) -> bool:
    """Whether a package exports something of a module's name: what is meant by `from kvlab.model
    import prefill` is the function."""
    package, _, name = module.rpartition(".")
    init = ROOT.parent.joinpath(*package.split("."), "__init__.py")
    return any(
        name in (alias.asname or alias.name for alias in node.names)
        for node in ast.parse(init.read_text()).body if isinstance(node, ast.ImportFrom)
    )


def listed() -> set[tuple[str, str]]:
    """Deep imports that stand until their rooms are rebuilt: `room module` a line."""
    lines = (line.partition("#")[0].split() for line in DEEP.read_text().splitlines())
    return {(words[0], words[1]) for words in lines if words}


def test_no_room_reaches_deep_into_another():
    """A room's package says what others may use: export the name there. The list only shrinks."""
    assert not sorted(deep() - listed())


def test_no_room_changes_objects_of_another():
    assert not [(str(path), told) for path in FILES if (told := patches(path.read_text()))]


@pytest.mark.parametrize(("source", "name"), [
    ("from kvlab import summary as room\nroom.SUMMARIES['x'] = 1", "room"),
    ("from kvlab.policy.base import _KNOWN\n_KNOWN['x'] += 1", "_KNOWN"),
    ("from kvlab.axes import TABLE\nif True:\n    TABLE.update(x=1)", "TABLE"),
    ("import kvlab.core\nclass X:\n    kvlab.core.Y.z = 3", "kvlab"),
    ("from kvlab.cache import CacheSpec\ndef f():\n    CacheSpec.format = 3", "CacheSpec"),
    ("from kvlab.cache import CacheSpec\nsetattr(CacheSpec, 'x', 3)", "CacheSpec"),
])  # fmt: skip
def test_a_change_of_another_rooms_object_would_be_seen(source, name):
    assert patches(source) == [name]


def test_no_cycles():
    assert cycle(graph()) is None
    assert cycle({"a": {"b"}, "b": {"a"}}) == ["a", "b", "a"]


@pytest.mark.parametrize("name", TORCH_FREE)
def test_left_column_imports_no_torch(name):
    heavy = {"torch", "transformers"}
    assert not [
        str(f) for module, f in ALL if room(module) == name and f.module.split(".")[0] in heavy
    ]


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_in_their_room(library):
    assert not [
        str(found) for name, found in ALL
        if found.module.split(".")[0] == library and room(name) not in ONLY_IN[library]
    ]  # fmt: skip


def test_functions_import_optional_libraries_only():
    allowed = OPTIONAL | SLOW
    assert not [
        str(found) for _, found in ALL
        if found.inside and found.module.split(".")[0] not in allowed and not wraps(found.module)
        and not found.module.endswith(OPTIONAL_ROOMS)
    ]  # fmt: skip


def wraps(module: str) -> bool:
    """Whether a module of ours cannot be imported without an optional library."""
    needs = {f.module.split(".")[0] for f in HOUSE.get(module, ()) if not f.inside}
    return bool(needs & OPTIONAL)
