"""Questions about an unresolved configuration: where does a value come from, what is used?

A tree is a plain container in which interpolations still stand as `${a.b}`; a path is dotted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")


def lookup(tree: dict, path: str) -> object:
    """The value written at `path`, interpolations not followed; None where there is nothing."""
    node: object = tree
    for part in path.split("."):
        if isinstance(node, list) and part.isdigit():
            node = dict(enumerate(node)).get(int(part))
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return node


def origin(tree: dict, path: str) -> str:
    """The key a user would set to change `path`: interpolations are followed to their end."""
    at = ""
    for part in path.split("."):
        at = f"{at}.{part}".lstrip(".")
        node = lookup(tree, at)
        if isinstance(node, str) and (match := REFERENCE.fullmatch(node)):
            at = origin(tree, match[1])
    return at


def leaves(node: object, at: str) -> Iterator[tuple[str, object]]:
    """Every path below `at` and its value, sections included."""
    yield at, node
    items = node.items() if isinstance(node, dict) else ()
    items = enumerate(node) if isinstance(node, list) else items
    for key, value in items:
        yield from leaves(value, f"{at}.{key}".lstrip("."))


def reachable(tree: dict, roots: list[str]) -> set[str]:
    """Origins of everything that the nodes at `roots` pull in, directly or not."""
    seen: set[str] = set()
    todo = [origin(tree, root) for root in roots]
    while todo:
        start = todo.pop()
        if start not in seen:
            for path, value in leaves(lookup(tree, start), start):
                seen.add(path)
                if isinstance(value, str):
                    todo += [origin(tree, reference) for reference in REFERENCE.findall(value)]
    return seen


def is_used(key: str, used: set[str]) -> bool:
    """Whether `key`, something inside it or the section that holds it is among `used`."""
    return key in used or any(path.startswith(key + ".") for path in used)
