"""Whether what fills a cache is still the model it was: a quick look and a full reading.

Prefixes are shared under one identity: config, modules, every parameter and buffer by content,
hooks, switches of adapters and autocast. What a foreign hook refers to may be beyond looking
through; then every reading gives another identity, and nothing is shared. The quick look comes
before each forward and compares objects, addresses and version counters; the full reading comes
when a request begins and before anything of it is made known, and sees what has no version
(`.data`, inference tensors), too.
"""

from __future__ import annotations

import itertools
import json
import logging
import weakref
from functools import lru_cache
from hashlib import blake2b

import torch
from torch import Tensor

from kvlab.cache import ModelFacts
from kvlab.core import KvlabError
from kvlab.model.fingerprint import fingerprint
from kvlab.model.traits import IGNORED, PROCESS, SCALARS, Traits, global_hooks

log = logging.getLogger(__name__)
_readings = itertools.count()

# The attention is not among it: a PagedCache is filled through kvlab's or not at all.
_IRRELEVANT = ("_attn_implementation", "transformers_version", "_name_or_path", "use_cache")


class LiveModel(ModelFacts):
    """A model that may change while a cache shares what it has computed.

    Holds it weakly; when it is gone, nothing of it is shared any more. Without foreign hooks the
    identity is the same in every process that has loaded the same model. Raises `BadInput` where
    weights are on the meta device.
    """

    def __init__(self, model):
        self._model, self._met = weakref.ref(model), weakref.WeakSet()
        self._kind, self._here, self._words = model.device.type, "", ""
        self._opaque: str | None = None
        self._places: list[tuple] = []
        self._own: set[int] = set()
        self._classes: dict[type, object] = {}
        self._marks: list = []
        self._refs: list[weakref.ref] = []
        super().__init__("", model.num_parameters())
        self.read()

    def read(self, here: bool = True) -> str:
        """Read the whole model. here: also whether autocast is on now; else as at last forward."""
        model = self._model()
        if model is None:
            self.identity = f"gone {id(self)}"
            return self.identity
        if here:
            self._kind = model.device.type
            self._here = circumstances(self._kind)
        tensors = self._unchanged()
        if tensors is None:
            tensors = self._describe(model)
        digest = blake2b(f"{self._words} {self._here}".encode(), digest_size=16)
        digest.update(fingerprint({id(x): x for x in tensors}.values()))
        if self._opaque is not None:  # no two readings are known to be of the same model
            digest.update(f"{PROCESS} {next(_readings)}".encode())
        self.identity = digest.hexdigest()
        return self.identity

    def moved(self) -> bool:
        """Whether anything looks other than when `read` last looked; a microsecond a module."""
        model = self._model()
        here = circumstances(self._kind)
        return model is None or here != self._here or self._unchanged() is None

    def check(self, module) -> None:
        """Raises `KvlabError` where `module` is neither of this model nor around it."""
        if module in self._met:
            return
        mine = self._model()
        if mine is None or not (_within(module, mine) or _within(mine, module)):
            raise KvlabError("this cache shares prefixes of another model object (prefix=hash); "
                             "make one with PagedCache.for_model for this model")
        self._met.add(module)

    def __deepcopy__(self, memo) -> LiveModel:
        """The copy of a cache is filled by the same model."""
        other = type(self).__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __reduce__(self):
        raise KvlabError("a cache that shares prefixes is bound to its model in this process and "
                         "cannot be pickled; cache.save writes what it knows")

    def _describe(self, model) -> list[Tensor]:
        """All but the contents of tensors, in words; the tensors."""
        modules = dict(model.named_modules())
        self._own = {id(module) for module in modules.values()}
        self._places = [_place(module) for module in modules.values()]
        self._classes = {type(m): getattr(type(m), "forward", None) for m in modules.values()}
        traits = Traits(self._own)
        for name, module in modules.items():
            traits.module(name, module)
            traits.words += [*module._parameters, *module._buffers]
        global_hooks(traits)
        config = {k: v for k, v in model.config.to_dict().items() if k not in _IRRELEVANT}
        self._words = json.dumps([config, traits.words], sort_keys=True, default=str)
        self._opaque = traits.opaque
        if self._opaque is not None:
            _say(self._opaque)
        self._marks, tensors = self._look(model)
        self._refs = [weakref.ref(x) for x in tensors]
        return tensors

    def _unchanged(self) -> list[Tensor] | None:
        """The tensors, where nothing but their contents can differ from what was described."""
        marks, tensors = self._look(self._model())
        if not _equal(marks, self._marks) or len(tensors) != len(self._refs):
            return None
        return None if any(r() is not x for r, x in zip(self._refs, tensors)) else tensors

    def _look(self, model) -> tuple[list, list[Tensor]]:
        """Marks of all modules, and their tensors."""
        config = {k: v for k, v in vars(model.config).items() if k not in _IRRELEVANT}
        marks: list = [repr(config), type(model)]
        marks += [getattr(cls, "forward", None) is f for cls, f in self._classes.items()]
        tensors: list[Tensor] = []
        traits = Traits(self._own)
        global_hooks(traits)
        for attributes, simple, others in self._places:
            marks.append(len(attributes))
            marks += map(attributes.get, simple)
            for child in attributes["_modules"].values():  # ids of dicts that are held here
                marks += (type(child), id(getattr(child, "__dict__", None)))
            tensors += attributes["_parameters"].values()
            tensors += attributes["_buffers"].values()
            hooks = attributes["_forward_hooks"], attributes["_forward_pre_hooks"]
            if others or hooks[0] or hooks[1] or "forward" in attributes:
                _look_closely(attributes, others, hooks, traits)
        tensors = [x for x in tensors + traits.tensors if x is not None]
        for x in tensors:
            marks += mark(x)
        return marks + traits.words, tensors


def _place(module) -> tuple[dict, list[str], list[str]]:
    """Attributes, and the names of those compared by value, and of those to be looked into."""
    attributes = vars(module)
    names = [name for name in attributes if name not in IGNORED and name != "forward"]
    simple = [name for name in names if isinstance(attributes[name], SCALARS)]
    looked = (list, tuple, dict, set, Tensor)
    others = [n for n in names if isinstance(attributes[n], looked) or callable(attributes[n])]
    return attributes, simple, [n for n in others if not isinstance(attributes[n], type)]


def _look_closely(attributes: dict, others: list[str], hooks, traits: Traits) -> None:
    """What few modules have: containers, functions and hooks."""
    for name in [*others, *(["forward"] if "forward" in attributes else [])]:
        traits.value(name, attributes.get(name))
    for found in hooks:
        traits.hooks(found)


def _equal(marks: list, others: list) -> bool:
    try:
        return marks == others
    except RuntimeError:  # a tensor where there was a number
        return False


def mark(x: Tensor) -> tuple[int, int]:
    """Address and version of a tensor; an inference tensor has no version."""
    try:
        return x.data_ptr(), 0 if x.is_inference() else x._version
    except RuntimeError:  # a wrapper of tensors has no address
        return id(x), 0


def circumstances(kind: str) -> str:
    """What outside a model on this kind of device changes what it computes: autocast."""
    return str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""


@lru_cache
def _say(what: str) -> None:
    """Once for each reason."""
    log.warning("prefix=hash shares nothing, since this model depends on %s", what)


def _within(module, model) -> bool:
    return any(m is module for m in model.modules())
