"""What the source says of itself: classes, lines, copies of a protocol, lists of the axes."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# What a request does with blocks: a room that calls all of these on a ledger has the protocol.
PROTOCOL = {"pin", "unpin", "reclaim", "free"}
LISTED = 3  # so many different axes named in one literal or signature: a list by hand


class Class(NamedTuple):
    """A class as written: bases by name, methods, attributes that it gives itself."""

    name: str
    file: str
    bases: list[str]
    methods: set[str]
    attributes: set[str]


def files(root: Path, below: str = "kvlab") -> list[Path]:
    return sorted((root / below).rglob("*.py"))


def room(root: Path, file: Path) -> str:
    """kvlab/cache/paged.py -> cache; kvlab/core.py -> core."""
    return file.relative_to(root / "kvlab").with_suffix("").parts[0]


def lines(root: Path) -> dict[str, tuple[int, int]]:
    """For each room: lines, and those with code (no comment, no docstring, not empty)."""
    found: dict[str, tuple[int, int]] = {}
    for file in files(root):
        text = file.read_text()
        here, code = found.get(room(root, file), (0, 0))
        found[room(root, file)] = here + text.count("\n"), code + len(_code_lines(text))
    return found


def _code_lines(text: str) -> set[int]:
    """Numbers of the lines with code on them."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER, tokenize.ENCODING)  # fmt: skip
    written = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in silent for line in range(token.start[0], token.end[0] + 1)
    }  # fmt: skip
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            written -= set(range(node.lineno, node.end_lineno + 1))
    return written


def classes(root: Path) -> list[Class]:
    """Every class of kvlab; bases as `module.Name` where an import says so."""
    found = []
    for file in files(root):
        tree = ast.parse(file.read_text())
        told = _imports(tree)
        here = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = [_absolute(name, told, here) for name in map(_name, node.bases)]
                methods, attributes = _members(node)
                found.append(Class(f"{here}.{node.name}", str(file.relative_to(root)), bases,
                                   methods, attributes))  # fmt: skip
    return found


def _imports(tree: ast.AST) -> dict[str, str]:
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # fmt: skip


def _absolute(name: str, told: dict[str, str], here: str) -> str:
    """`core.PagedCache` after `from kvlab import cache as core` is kvlab.cache.PagedCache."""
    head, dot, rest = name.partition(".")
    return told.get(head, f"{here}.{head}") + dot + rest


def _name(node: ast.AST) -> str:
    return ast.unparse(node.value if isinstance(node, ast.Subscript) else node)


def _members(node: ast.ClassDef) -> tuple[set[str], set[str]]:
    methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    attributes = {
        n.target.id for n in node.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }  # fmt: skip
    attributes |= {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
        and isinstance(n.value, ast.Name) and n.value.id == "self"
    }  # fmt: skip
    return methods, attributes - methods


def inherited(root: Path) -> dict[str, tuple[set[str], set[str]]]:
    """Methods and attributes of each class with all that it inherits inside kvlab."""
    by_name = {one.name: one for one in classes(root)}
    exported = {  # `from kvlab.cache import X` names the package; its __init__ says which module
        f"{'.'.join(file.parent.relative_to(root).parts)}.{name}": path
        for file in files(root) if file.name == "__init__.py"
        for name, path in _imports(ast.parse(file.read_text())).items()
    }  # fmt: skip

    def all_of(one: Class) -> tuple[set[str], set[str]]:
        methods, attributes = set(one.methods), set(one.attributes)
        for base in one.bases:
            parent = by_name.get(exported.get(base, base))
            if parent is not None:
                more = all_of(parent)
                methods, attributes = methods | more[0], attributes | more[1]
        return methods, attributes

    return {name: all_of(one) for name, one in by_name.items()}


def protocols(root: Path) -> dict[str, dict[str, set[str]]]:
    """Rooms that call every verb of `PROTOCOL` on a ledger, with the files and their verbs."""
    called: dict[str, dict[str, set[str]]] = {}
    for file in files(root):
        verbs = {
            node.func.attr
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value).endswith("ledger") and node.func.attr in PROTOCOL
        }  # fmt: skip
        if verbs:
            called.setdefault(room(root, file), {})[str(file.relative_to(root))] = verbs
    return {name: by for name, by in called.items() if set().union(*by.values()) == PROTOCOL}


def axis_names(root: Path) -> set[str]:
    """Names of the config groups that a cache is built from, as `conf/cache` says or the table."""
    import sys

    sys.path.insert(0, str(root))
    from kvlab import axes

    return set(axes.AXES)


def axis_lists(root: Path) -> dict[str, int]:
    """Files that list the axes by hand: the most axes that one construct of theirs names."""
    names = axis_names(root)
    found = {}
    for file in (*files(root), *files(root, "tests")):
        most = max((len(names & told) for told in _lists(ast.parse(file.read_text()))), default=0)
        if most >= LISTED:
            found[str(file.relative_to(root))] = most
    for file in (root / "conf" / "config.yaml", *sorted((root / "conf" / "cache").glob("*.yaml"))):
        words = {line.strip(" -").partition(":")[0] for line in file.read_text().splitlines()}
        if len(names & words) >= LISTED:
            found[str(file.relative_to(root))] = len(names & words)
    return found


def _lists(tree: ast.AST) -> Iterator[set[str]]:
    """Strings of each collection, parameters, fields, attributes read. A call that makes a cache of
    three axes lists nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            yield {n.value for n in node.elts if isinstance(n, ast.Constant)} | _read(node)
        elif isinstance(node, ast.Dict):
            yield {n.value for n in node.keys if isinstance(n, ast.Constant)}
        elif isinstance(node, ast.arguments):
            yield {a.arg for a in (*node.args, *node.kwonlyargs)}
        elif isinstance(node, ast.ClassDef):
            yield {n.target.id for n in node.body
                   if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}  # fmt: skip


def _read(node: ast.AST) -> set[str]:
    """Attributes of something called spec: `(spec.summary, spec.retrieval, spec.offload)`."""
    return {n.attr for n in getattr(node, "elts", ()) if isinstance(n, ast.Attribute)}
