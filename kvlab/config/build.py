"""Nodes with a `_target_`: checked against its signature, then built."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from kvlab.config.explain import complaint
from kvlab.config.signature import describe, did_you_mean, fits, parameters, show
from kvlab.config.tree import leaves, lookup, origin
from kvlab.core import BadInput

_HYDRA_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
_OPEN_ENDED = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
_FULL_KEY = re.compile(r"full_key: (\S+)")


def target_of(tree: dict, path: str) -> Callable:
    """The class a node names. Raises `BadInput` where the name leads nowhere."""
    node = lookup(tree, origin(tree, path))
    name = node.get("_target_") if isinstance(node, dict) else None
    if name is None:
        raise BadInput(path, show(node), "must be a section with a _target_")
    where, (module, _, attribute) = f"{origin(tree, path)}._target_", str(name).rpartition(".")
    try:
        room = import_module(module or str(name))
    except ModuleNotFoundError as error:
        raise BadInput(where, name, f"cannot be imported: {error}") from error
    if not hasattr(room, attribute):
        raise BadInput(where, name, f"cannot be imported: {module} has no {attribute}")
    return getattr(room, attribute)


def check(tree: dict, resolved: object, path: str) -> None:
    """Hold `resolved`, the value of `path`, and all nodes inside it against their classes.

    Raises `BadInput` for a stray, missing or mistyped setting, naming the key to change.
    """
    if isinstance(resolved, dict):
        if "_target_" in resolved:
            _check_call(tree, resolved, path)
        for key, value in resolved.items():
            check(tree, value, f"{path}.{key}")
    elif isinstance(resolved, list):
        for index, value in enumerate(resolved):
            check(tree, value, f"{path}.{index}")


def _check_call(tree: dict, node: dict, path: str) -> None:
    params, hints = parameters(target_of(tree, path))
    named = [n for n, p in params.items() if p.kind not in _OPEN_ENDED]
    open_ended = len(named) < len(params)
    for key in (k for k in node if k not in _HYDRA_KEYS):
        where, value = origin(tree, f"{path}.{key}"), node[key]
        if key not in params and not open_ended:
            raise BadInput(where, show(value), f"no such setting; {did_you_mean(key, named)}")
        if value == "???":
            raise BadInput(where, value, f"must be given: {where}=...")
        if key in hints and not fits(value, hints[key]):
            raise BadInput(where, show(value), f"must be {describe(hints[key])}")
    if not node.get("_partial_"):
        _refuse_missing(tree, node, path, params)


def _refuse_missing(tree: dict, node: dict, path: str, params: dict) -> None:
    empty = inspect.Parameter.empty
    needed = [n for n, p in params.items() if p.default is empty and p.kind not in _OPEN_ENDED]
    for name in needed:
        if name not in node:
            where = f"{origin(tree, path)}.{name}"
            raise BadInput(where, "null", f"must be given: {where}=...")


def build(tree: dict, resolved: dict, path: str) -> object:
    """Instantiate the node at `path`; its own `BadInput` gets the key of the configuration.

    Factories inside it (`_partial_`) are called once for trial: their ranges are checked now and
    not in the middle of the run.
    """
    for inner, node in leaves(resolved, path):
        if isinstance(node, dict) and node.get("_partial_"):
            _instantiate(tree, {**node, "_partial_": False}, inner)
    return _instantiate(tree, resolved, path)


def _instantiate(tree: dict, resolved: dict, path: str) -> object:
    try:
        return instantiate(OmegaConf.create(resolved), _convert_="all")
    except InstantiationException as error:
        own = complaint(error)
        if not isinstance(own, BadInput) or "." in own.key:
            raise
        found = _FULL_KEY.search(str(error))  # relative to the node; absent for the node itself
        at = f"{path}.{found[1]}" if found else path
        raise BadInput(_config_key(tree, at, own.key), own.value, own.remedy) from error


def _config_key(tree: dict, at: str, key: str) -> str:
    """`sinks`, complained about by the node at `spec.window`, is `window.sinks` to the user."""
    node = lookup(tree, origin(tree, at))
    return origin(tree, f"{at}.{key}") if isinstance(node, dict) and key in node else key
