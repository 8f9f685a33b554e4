"""What tells from source, and from a living object, whether a wall between rooms holds."""

from __future__ import annotations

import ast
import gc
import types
import weakref
from collections import deque
from collections.abc import Iterator
from functools import partial

CHANGES = ("append", "add", "update", "setdefault", "insert", "extend", "register", "pop", "clear")
KEPT_BY_PYTHON = ("weakref.finalize", "Thread")  # take `self` to call it once, and let it go


# ---- objects of other rooms that are changed


def patches(source: str) -> list[str]:
    """Objects that were imported from kvlab and are changed: by assignment and `setattr` anywhere,
    by a method that changes what it is called on while the module is imported."""
    tree = ast.parse(source)
    foreign = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).startswith("kvlab")
    }  # fmt: skip
    imported = {id(node) for node in at_import(tree)}
    return [
        name for node in ast.walk(tree)
        for name in changed(node, id(node) in imported) if name in foreign
    ]  # fmt: skip


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs while the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import(node)


def changed(node: ast.AST, imported: bool) -> Iterator[str]:
    """Names of what a statement or call changes a part of."""
    targets: list = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
        yield from root(node.args[0])
    elif imported and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield from root(node.func.value) if node.func.attr in CHANGES else ()
    for target in targets:
        if isinstance(target, ast.Attribute | ast.Subscript):
            yield from root(target)


def root(node: ast.AST) -> Iterator[str]:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id


# ---- objects that know who holds them


def handed(source: str) -> list[str]:
    """`Holder -> Part` for every object made with `self` or a method of it as an argument, and
    `Holder = self` for `self` put into another object. What is raised keeps nothing."""
    tree = ast.parse(source)
    raised = {id(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    found = []
    for holder in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        methods = {n.name for n in holder.body if isinstance(n, ast.FunctionDef)
                   and not n.decorator_list}  # fmt: skip
        for node in ast.walk(holder):
            if isinstance(node, ast.Call) and id(node) not in raised and _makes(node.func):
                given = (*node.args, *(keyword.value for keyword in node.keywords))
                if any(_is_self(value, methods) for value in given):
                    found.append(f"{holder.name} -> {ast.unparse(node.func)}")
            elif isinstance(node, ast.Assign) and _is_self(node.value, ()):
                found.append(f"{holder.name} = self in {ast.unparse(node.targets[0])}")
    return found


def _makes(function: ast.AST) -> bool:
    """A class by its capital, or a weak reference."""
    name = ast.unparse(function)
    if name.endswith(KEPT_BY_PYTHON):
        return False
    return name.rpartition(".")[2].lstrip("_")[:1].isupper() or name.startswith("weakref.")


def _is_self(node: ast.AST, methods) -> bool:
    if isinstance(node, ast.Attribute) and node.attr in methods:
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"


def rings(start: object) -> list[tuple[str, ...]]:
    """Classes of kvlab whose objects, below `start`, hold one another in a circle, weak references
    counted like others."""
    held: dict[int, list[object]] = {}
    alive, todo = {id(start): start}, [start]
    while todo:
        one = todo.pop()
        held[id(one)] = list(_parts(one))
        fresh = [part for part in held[id(one)] if id(part) not in alive]
        alive.update((id(part), part) for part in fresh)
        todo += {id(part): part for part in fresh}.values()
    below = {key: _reached(key, held) for key in held}
    return sorted({
        tuple(sorted({type(alive[k]).__name__ for k in below[key] if key in below[k]}))
        for key in held if key in below[key]
    })  # fmt: skip


def _reached(start: int, held: dict[int, list[object]]) -> set[int]:
    seen: set[int] = set()
    todo = [id(part) for part in held[start]]
    while todo:
        key = todo.pop()
        if key not in seen:
            seen.add(key)
            todo += [id(part) for part in held[key]]
    return seen


def _parts(holder: object) -> Iterator[object]:
    """Objects of kvlab's classes that `holder` holds: itself, in containers, in functions."""
    seen: set[int] = set()
    todo = gc.get_referents(holder)
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType):
            continue
        seen.add(id(one))
        if isinstance(one, weakref.ProxyTypes):
            yield one.__repr__.__self__  # what it stands for
        elif isinstance(one, weakref.ref):
            todo.append(one())
        elif type(one).__module__.startswith("kvlab"):
            yield one
        elif isinstance(one, types.FunctionType):
            todo += one.__closure__ or ()
        elif isinstance(one, PASSED):
            todo += gc.get_referents(one)


PASSED = (dict, list, tuple, set, frozenset, deque, partial, types.MethodType, types.CellType)
