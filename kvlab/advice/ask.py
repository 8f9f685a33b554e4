"""What is asked: the words of `python -m kvlab advise`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvlab.core import BadInput

GOALS = {
    "exact": "nothing is lost",
    "facts": "all of the text can be found again",
    "chat": "many turns that begin alike",
    "stream": "text without end",
}


class Ask(NamedTuple):
    """context: tokens of one request at its end, `now` of them at first. requests: at one time.

    memory_gb: of the device, 10^9 bytes each, for weights and all. device: its name, by which
    measured speeds are looked up. model: the words that name it, for the commands to be told.
    """

    memory_gb: float
    context: int
    requests: int = 1
    goal: str | None = None
    now: int = 4096
    device: str | None = None
    model: tuple[str, ...] = ()


_KEYS = {"device.memory_gb": "memory_gb", "context": "context", "requests": "requests",
         "goal": "goal", "now": "now", "device.name": "device"}  # fmt: skip


def parse(words: Sequence[str]) -> Ask:
    """From `key=value` words; those of the model (`model=...`, `model.path=...`) are kept as they
    stand. Raises `BadInput`."""
    given, model = {}, []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key.partition(".")[0] == "model":
            model.append(word)
        elif not equals or key not in _KEYS:
            raise BadInput("advise", word, f"takes model=..., {'=..., '.join(_KEYS)}=...")
        else:
            given[_KEYS[key]] = _value(key, value)
    for key, why in (("device.memory_gb", "16 for a card of 16 GB"),
                     ("context", "131072, the tokens of one request")):
        if _KEYS[key] not in given:
            raise BadInput(key, "null", f"must be given: {key}={why}")
    asked = Ask(**given, model=tuple(model))
    return asked._replace(now=min(asked.now, asked.context))


def _value(key: str, text: str) -> object:
    if key == "device.name":
        return text
    if key == "goal":
        if text not in GOALS:
            told = "; ".join(f"{name} ({why})" for name, why in GOALS.items())
            raise BadInput("goal", text, f"must be one of: {told}")
        return text
    whole = key != "device.memory_gb"
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e12:
        kind = "a whole number from 1 on" if whole else "a number of GB above 0"
        raise BadInput(key, text, f"must be {kind}")
    return value
