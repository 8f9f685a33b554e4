"""Jobs and parts for tests of the command line: they compute nothing and import no torch."""

from __future__ import annotations

import time
from typing import Literal

from kvlab.core import BadInput, KvlabError, Measurement

ARCHITECTURES = ("Qwen3", "Llama", "Qwen2", "Mistral")


class Part:
    """Something a job pulls in by interpolation."""

    def __init__(self, size: int = 4, kind: Literal["a", "b"] = "a", share: float | None = None):
        if size < 1:
            raise BadInput("size", size, "must be at least 1")
        self.size, self.kind, self.share = size, kind, share


class Count:
    """Writes one number a variant; `fail` names what happens instead or afterwards.

    seconds: the constructor takes them, so that the clock moves between check and run.
    """

    wants_specs = False

    def __init__(
        self, part: Part, tokens: int = 8, fail: str | None = None, seconds: float = 0.0
    ):
        self.part, self.tokens, self.fail = part, tokens, fail
        time.sleep(seconds)

    def run(self, folder, variants):
        if self.fail == "early":
            raise BadInput("model.path", "x", "is broken")
        for variant in variants:
            held = folder.done(variant.name, variant.params)
            if not held:
                value = Measurement("size", variant.spec.size if variant.spec else 0, "blocks")
                folder.add(variant.name, variant.params, [value])
            if self.fail == "late":
                raise KvlabError("the second variant does not fit")
            if self.fail == "defect":
                raise ZeroDivisionError("a defect")
            if self.fail == "interrupt" and not held and variant is variants[0]:
                raise KeyboardInterrupt


class CountSpecs(Count):
    """As Count, with a built spec for every variant."""

    wants_specs = True


class CountData(CountSpecs):
    """As CountSpecs, over real documents and a real model."""

    def __init__(self, part: Part, data: object, model: object, fail: str | None = None):
        super().__init__(part, fail=fail)
        self.data, self.model = data, model

    def run(self, folder, variants):
        loaded = self.model.load("cpu")
        self.data.documents(loaded.tokenizer, 1, 64)
        super().run(folder, variants)


class Spec:
    """A cache specification in small."""

    def __init__(self, format: object, size: int = 4, share: float | None = None):
        if size < 1:
            raise BadInput("size", size, "must be at least 1")
        if share is not None and size == 13:
            raise BadInput("share", share, "cannot be combined with cache.size=13")
        self.format, self.size, self.share = format, size, share
