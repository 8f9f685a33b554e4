"""Nodes with a `_target_`: checked against its signature, then built."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from kvlab.axes import load
from kvlab.config.explain import complaint
from kvlab.config.signature import describe, did_you_mean, fits, parameters, show
from kvlab.config.tree import leaves, lookup, origin
from kvlab.core import BadInput

_OF_HYDRA = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
_OPEN_ENDED = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
_FULL_KEY = re.compile(r"full_key: (\S+)")


def target_of(tree: dict, path: str) -> Callable:
    """The class a node names. Raises `BadInput` where the name leads nowhere."""
    where = origin(tree, path)
    node = lookup(tree, where)
    if not isinstance(node, dict) or "_target_" not in node:
        raise BadInput(path, show(node), "must be a section with a _target_")
    return load(f"{where}._target_", str(node["_target_"]))


def check(tree: dict, resolved: object, path: str) -> None:
    """Hold `resolved`, the value of `path`, and all nodes inside it against their classes.

    Raises `BadInput` for a stray, missing or mistyped setting, naming the key to change.
    """
    for inner, node in leaves(resolved, path):
        if isinstance(node, dict) and "_target_" in node:
            given = {key: value for key, value in node.items() if key not in _OF_HYDRA}
            check_call(target_of(tree, inner), given, lambda key, at=inner: origin(
                tree, f"{at}.{key}"), partial=bool(node.get("_partial_")))  # fmt: skip


def check_call(
    target: Callable, given: dict, key_of: Callable[[str], str] = str, partial: bool = False
) -> None:
    """Hold arguments against a signature; `key_of` an argument is what a user sets.

    partial: others may come later.
    """
    params, hints = parameters(target)
    named = {name: p for name, p in params.items() if p.kind not in _OPEN_ENDED}
    for name, value in given.items():
        if name not in params and len(named) == len(params):
            remedy = f"no such setting; {did_you_mean(name, list(named))}"
            raise BadInput(key_of(name), show(value), remedy)
        if value == "???":
            raise BadInput(key_of(name), value, f"must be given: {key_of(name)}=...")
        if name in hints and not fits(value, hints[name]):
            raise BadInput(key_of(name), show(value), f"must be {describe(hints[name])}")
    for name, parameter in named.items():
        if not partial and name not in given and parameter.default is parameter.empty:
            raise BadInput(key_of(name), "null", f"must be given: {key_of(name)}=...")


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
        at = origin(tree, f"{path}.{found[1]}" if found else path)
        # `sinks`, complained about by the node at `spec.window`, is `window.sinks` to the user
        known = own.key in (lookup(tree, at) or ())
        key = origin(tree, f"{at}.{own.key}") if known else own.key
        raise BadInput(key, own.value, own.remedy) from error
