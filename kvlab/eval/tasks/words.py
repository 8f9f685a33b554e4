"""Words, numbers and names that tasks are made of, drawn from `random.Random` alone."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from string import ascii_uppercase
from uuid import UUID

from kvlab.core import BadInput

NOISE = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
         "There and back again.")  # fmt: skip


@lru_cache
def word_list(kind: str) -> tuple[str, ...]:
    """Distinct words of wonderwords in order; kind: noun, adjective or verb.

    Raises `BadInput` where the package is not installed.
    """
    found = find_spec("wonderwords")
    if found is None or found.origin is None:
        raise BadInput("task", "wonderwords", "RULER's words come from this package, which is not "
                       "installed: pip install 'kvlab[tasks]'")
    text = (Path(found.origin).parent / "assets" / f"{kind}list.txt").read_text("utf-8")
    return tuple(sorted({word.strip() for word in text.splitlines() if word.strip()}))


def pair_of_words(rng: Random) -> str:
    """`adjective-noun`, each pair as likely."""
    return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"


def number(digits: int, rng: Random) -> str:
    """Its first digit is none of 0."""
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def uuid(rng: Random) -> str:
    """Version 4, of 128 random bits."""
    return str(UUID(int=rng.getrandbits(128), version=4))


def distinct(count: int, make) -> list[str]:
    """`count` different results of `make()`, in the order in which they came."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def capitals(letters: int, rng: Random) -> str:
    """A variable's name."""
    return "".join(rng.choices(ascii_uppercase, k=letters))


def place(rng: Random) -> str:
    """A name that nobody has: three syllables."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)).title()
