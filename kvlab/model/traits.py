"""What of a model's modules changes their effect, beside the tensors they hold.

Classes, simple attributes (PEFT keeps its switches there), plain tensors in attributes, hooks and
functions put in place of methods. A foreign function cannot be known by its content in another
process; in this one it is known by a number, and by what it closes over. Where it refers to more
than numbers, tensors and libraries, nobody can tell whether it does the same again: `opaque`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import uuid
import weakref
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

PROCESS = uuid.uuid4().hex  # in the identity where foreign functions are: no other process has it
LIBRARIES = ("torch.", "transformers.", "kvlab.", "accelerate.")
HARMLESS = (  # functions that look on, or compute what they replace
    "kvlab.model.tokens", "kvlab.model.fuse", "transformers.utils.output_capturing",
)  # fmt: skip
IGNORED = (set(vars(nn.Module())) - {"training"}) | {
    "_is_hf_initialized", "name_or_path", "loss_type", "gradient_checkpointing", "warnings_issued",
    "_output_capturing_hooks_installed",
    "_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan", "all_tied_weights_keys",
}  # fmt: skip
SCALARS = (bool, int, float, str, type(None), torch.dtype, torch.device)
MOST = 64  # entries of a container that is looked into
DEPTH = 3
_numbers: weakref.WeakKeyDictionary[Callable, int] = weakref.WeakKeyDictionary()
_kept: list = []  # what takes no weak reference: its id must not be given to another
_count = itertools.count()


class Traits:
    """Collects `words`, and in `tensors` what has to be known by content.

    own: ids of the modules that are read anyway. opaque: what cannot be known, None if nothing.
    """

    def __init__(self, own: set[int] = frozenset()):
        self.words: list = []
        self.opaque: str | None = None
        self._trusting = False  # within what a library's function refers to
        self.tensors: list[Tensor] = []
        self.own = own

    def module(self, name: str, module: nn.Module) -> None:
        """All but parameters, buffers and children."""
        self.words.append(name)
        self.kind(type(module))
        for key, value in vars(module).items():
            if key not in IGNORED:
                self.value(key, value)
        self.hooks(module._forward_pre_hooks)
        self.hooks(module._forward_hooks)

    def kind(self, cls: type) -> None:
        """A class by its name; one that no library has, by the code of its forward, too.

        A forward from elsewhere was put in place of the class's own, for all models.
        """
        forward = getattr(cls, "forward", None)
        self.words.append(f"{cls.__module__}.{cls.__qualname__}")
        if not f"{cls.__module__}.".startswith(LIBRARIES):
            self.code(inspect.unwrap(forward))
            self.named(inspect.unwrap(forward))
        if _home(forward) not in {c.__module__ for c in cls.__mro__}:
            self.function(forward)

    def hooks(self, hooks: dict[int, Callable]) -> None:
        """Handles are numbers that torch gives once in a process."""
        for handle, hook in hooks.items():
            if _home(hook) not in HARMLESS:
                self.words += [handle] * _foreign(hook)
                self.function(hook)

    def function(self, f: Callable, depth: int = DEPTH) -> None:
        """A function: a library's by its name, another by its number; and what it refers to."""
        name = f"{_home(f)}.{getattr(_inner(f), '__qualname__', '')}"
        self.words.append(f"{PROCESS} {number_of(f)}" if _foreign(f) else name)
        before, self._trusting = self._trusting, self._trusting or not _foreign(f)
        self.refers(f, depth)
        self._trusting = before

    def unknown(self, what) -> None:
        """Something has a state that cannot be looked through."""
        if not self._trusting:
            self.opaque = self.opaque or str(what)

    def named(self, f) -> None:
        """What a foreign function may name besides simple values: libraries and builtins."""
        f = _inner(f)
        if not isinstance(f, FunctionType):
            return
        for name in _names(f.__code__) & f.__globals__.keys():
            value = f.__globals__[name]
            if isinstance(value, (*SCALARS, Tensor, list, dict, BuiltinFunctionType)):
                continue
            home = value.__name__ if isinstance(value, ModuleType) else _home(value)
            if f"{home}.".startswith((*LIBRARIES, "math.", "builtins.")):
                continue
            self.unknown(f"{f.__qualname__} of {_home(f)}, which refers to {name}")

    def refers(self, f, depth: int) -> None:
        """Arguments bound to a function, what it closes over, and simple globals that it names."""
        if isinstance(f, functools.partial):
            self.value("args", [*f.args, *f.keywords.values()], depth - 1)
            f = f.func
        owner = getattr(f, "__self__", None)  # of a builtin function its module, which is no state
        if owner is not None and not isinstance(owner, ModuleType):
            self.object(owner, depth - 1)
        f = _inner(f)
        if not isinstance(f, FunctionType):
            self.object(f, depth - 1)
            return
        cells = [c.cell_contents for c in f.__closure__ or () if _filled(c)]
        self.value("closure", [*cells, *(f.__defaults__ or ())], depth - 1)
        if _foreign(f):
            self.named(f)
            used = {n: f.__globals__[n] for n in f.__code__.co_names if n in f.__globals__}
            self.value("globals", {n: v for n, v in used.items()
                                   if isinstance(v, (*SCALARS, Tensor, list, dict))}, depth - 1)

    def object(self, x, depth: int) -> None:
        """Something that is called or referred to: its attributes, if a library made its class."""
        if id(x) not in self.own and not f"{type(x).__module__}.".startswith(
            (*LIBRARIES, "builtins.")
        ):
            self.unknown(f"an object of {type(x).__module__}.{type(x).__qualname__}")
        self.inside(x, depth)

    def inside(self, x, depth: int) -> None:
        """Attributes of an object; of a module outside the model its tensors."""
        if id(x) in self.own:
            return
        if depth < 0:
            self.unknown(f"an object of {type(x).__qualname__} deep inside of others")
            return
        if isinstance(x, nn.Module):
            self.tensors += [*x.parameters(), *x.buffers()]
        for key, value in getattr(x, "__dict__", {}).items():
            if not (isinstance(x, nn.Module) and key in IGNORED):
                self.value(key, value, depth)

    def value(self, key: str, x, depth: int = DEPTH) -> None:
        """A simple value as it is, a tensor, a function; containers of them, as far as `depth`."""
        if isinstance(x, SCALARS):
            self.words.append((key, str(x)))
        elif isinstance(x, Tensor):
            self.tensors.append(x)
        elif isinstance(x, type):
            if _foreign_class(x):
                self.unknown(f"the class {x.__qualname__} as {key}")
        elif depth < 0:
            self.unknown(f"{key}, deep inside of others")
        elif isinstance(x, (list, tuple, dict, set, frozenset)):
            self.words.append((key, len(x)))
            if len(x) > MOST:
                self.unknown(f"{key}, which has {len(x)} entries")
            pairs = x.items() if isinstance(x, dict) else enumerate(
                sorted(x, key=str) if isinstance(x, (set, frozenset)) else x)
            for name, item in itertools.islice(pairs, MOST):
                self.value(f"{key}.{name}", item, depth - 1)
        elif isinstance(x, nn.Module):
            self.object(x, depth - 1)
        elif callable(x):
            if _home(x) not in HARMLESS:
                self.words.append(key)
                self.function(x, depth)
        elif depth < DEPTH:  # an object that a function refers to
            self.object(x, depth - 1)
        elif _foreign_class(type(x)):  # an attribute of a module
            self.unknown(f"{key}, an object of {type(x).__qualname__}")

    def code(self, f) -> None:
        """What a function does, as far as its bytecode and constants say."""
        code = getattr(_inner(f), "__code__", None)
        if code is not None:
            self.words.append(f"{code.co_code.hex()} {code.co_names}")
            self.words += [c for c in code.co_consts if isinstance(c, SCALARS)]


def global_hooks(traits: Traits) -> None:
    """Hooks that torch runs at every module."""
    traits.hooks(torch_modules._global_forward_pre_hooks)
    traits.hooks(torch_modules._global_forward_hooks)


def number_of(f: Callable) -> int:
    """A number that no other function of this process has, as long as ids are given anew."""
    try:
        return _numbers.setdefault(f, next(_count))
    except TypeError:
        if not any(f is kept for kept in _kept):
            _kept.append(f)
        return id(f)


def _inner(f):
    """The function in a partial or a bound method."""
    while isinstance(f, functools.partial):
        f = f.func
    return getattr(f, "__func__", f)


def _home(f) -> str:
    """The module whose code it is: `functools.wraps` copies the name of another's."""
    f = _inner(f)
    if isinstance(f, FunctionType):
        return f.__globals__.get("__name__", "")
    return getattr(f, "__module__", None) or ""


def _foreign(f) -> bool:
    """Whether no library has it; modules as functions hold weights, so their name says little."""
    return isinstance(f, nn.Module) or not f"{_home(f)}.".startswith(LIBRARIES)


def _foreign_class(cls: type) -> bool:
    return not f"{cls.__module__}.".startswith((*LIBRARIES, "builtins.", "collections."))


def _names(code: CodeType) -> set[str]:
    """Names that a function looks up or asks attributes of, its inner functions too."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _filled(cell) -> bool:
    try:
        return cell is not None and cell.cell_contents is not None
    except ValueError:
        return False
