"""Binds the functions of a module to a policy: the same code with other globals.

numba compiles a function for the functions that its globals name, so that each binding becomes one
piece of machine code with the policy's verbs inlined. It is kept on disk as numba does, under a
name with a digest of all sources of this room, since numba looks at no file but the function's own.
"""

from __future__ import annotations

import os
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import FunctionType, ModuleType

from numba import config, njit

# Nothing here allocates, so numba need not count references: of fifteen arrays at each call, a
# hundred times the work of a verb.
OPTIONS = {"nogil": True, "_nrt": False}
# Called by compiled code only: what Python would call costs half the time of compiling.
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **OPTIONS}
verb = njit(forceinline=True, **INNER)
rare = njit(**INNER)  # seldom called, so not worth its code in every caller


def cached(function, **options):
    """Compiled, its machine code kept in the user's cache folder, where NUMBA_CACHE_DIR names no
    other: a read-only installation keeps it too."""
    chosen = config.CACHE_DIR
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    config.CACHE_DIR = chosen or str(Path(root) / "kvlab" / "numba")
    try:
        return njit(function, cache=True, **OPTIONS, **options)
    finally:
        config.CACHE_DIR = chosen


@cache
def _digest() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def bind(template: ModuleType, label: str, entry: str = "", **names) -> dict:
    """The names of `template`, its functions compiled so that they see these names too.

    entry: the function that Python calls; its machine code is kept on disk.
    """
    space = {**vars(template), **names}
    for name, function in vars(template).items():
        if isinstance(function, FunctionType) and function.__module__ == template.__name__:
            copy = FunctionType(function.__code__, space, name, function.__defaults__)
            copy.__module__ = template.__name__
            copy.__qualname__ = f"{name}_{label}_{_digest()}"
            called = name == entry
            space[name] = cached(copy) if called else verb(copy)
    return space


def module_of(name: str, names: dict) -> ModuleType:
    """A module with these names: numba takes what a module holds as constant."""
    module = ModuleType(name)
    vars(module).update({n: value for n, value in names.items() if not n.startswith("__")})
    return module
