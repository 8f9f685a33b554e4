"""RULER's eight needles in a haystack, https://arxiv.org/abs/2404.06654.

Definitions and wording are those of github.com/NVIDIA/RULER at c3f5e3b (Apache-2.0). A key is told
with a value somewhere in a haystack; the question names the key. What differs: items are drawn
with other random numbers, text is split into sentences without nltk, and a prompt that is too long
is drawn again with the same keys in less of a haystack.
"""

from __future__ import annotations

from random import Random

from kvlab.core import BadInput
from kvlab.eval.tasks import haystack
from kvlab.eval.tasks.drawn import Drawn
from kvlab.eval.tasks.protocol import Protocol
from kvlab.eval.tasks.wording import Asked, Prompt
from kvlab.eval.tasks.words import NOISE, number, pair_of_words, uuid

NEEDLE = "One of the special magic {type} for {key} is: {value}."
BEFORE = ("Some special magic {type} are hidden within the following text. Make sure to memorize "
          "it. I will quiz you about the {type} afterwards.\n")  # fmt: skip
QUESTION = "What are all the special magic {type} for {query} mentioned in the provided text?"
PREFIX = " The special magic {type} for {query} mentioned in the provided text are"


class Niah(Drawn):
    """hay: noise, needle (other keys and values) or text. key, value: words, numbers or uuids.

    keys, values, queries: how many of each; values of a key, queries in one question.
    digits: of a number; RULER's are 7, more are harder to copy.
    essays: see `kvlab.eval.tasks.haystack`.
    """

    generates = 128
    copies = True
    settings = ("digits",)
    hay, key, value = "text", "words", "numbers"
    keys = values = queries = 1

    def __init__(
        self, protocol: Protocol | None = None, digits: int = 7, essays: str | None = None
    ):
        if not 1 <= digits <= 1000:
            raise BadInput("task.digits", digits, "must lie between 1 and 1000")
        self.digits, self.essays = digits, essays
        if self.hay == "text" and essays is None:
            self.name = f"{self.name}-books"
        self.exactly = self.values * self.queries == 1
        super().__init__(protocol)

    def fit_to(self, length: int) -> None:
        super().fit_to(length)
        if self.hay == "text":
            self.least, self.step = 20, 50 if length < 4096 else 500
        else:
            self.least, self.step = max(5, self.keys * self.values), 5 if length < 4096 else 25

    def read_from(self) -> str:
        return haystack.origin(self.essays) if self.hay == "text" else ""

    def prompt(self, units: int, rng: Random) -> Prompt:
        def some(kind: str) -> str:
            return number(self.digits, rng) if kind == "numbers" else KINDS[kind](rng)

        keys = [some(self.key) for _ in range(max(self.keys, self.queries))]
        told = [[some(self.value) for _ in range(self.values)] for _ in keys]
        needles = [needle(self.value, key, v) for key, values in zip(keys, told) for v in values]
        Random(self.seed).shuffle(needles)  # one order for all items, as RULER has it
        if self.hay == "text":
            context = haystack.hidden(needles, units, self.essays, rng)
        else:
            lines = [NOISE] * units
            if self.hay == "needle":
                lines = [needle(self.value, some(self.key), some(self.value)) for _ in lines]
            context = among(needles, lines, rng)
        asked = rng.sample(range(len(keys)), self.queries)
        query = listed([keys[n] for n in asked])
        texts = tuple(value for n in asked for value in told[n])
        return worded(self.value, self.exactly, context, query, texts)


KINDS = {"words": pair_of_words, "uuids": uuid}


def needle(kind: str, key: str, value: str) -> str:
    return NEEDLE.format(type=kind, key=key, value=value)


def among(needles: list[str], lines: list[str], rng: Random) -> str:
    """`lines` with the needles between them, at places that are drawn."""
    places = sorted(rng.sample(range(len(lines)), len(needles)), reverse=True)
    for at, one in zip(places, needles):
        lines.insert(at, one)
    return "\n".join(lines)


def worded(kind: str, one: bool, context: str, query: str, texts: tuple[str, ...]) -> Prompt:
    """one: whether a single value is asked for; RULER speaks of it so."""
    words = (BEFORE, QUESTION, PREFIX)
    if one:
        kind, words = kind[:-1], map(singular, words)
    before, question, prefix = (w.format(type=kind, query=query) for w in words)
    return Prompt(f"{before}{context}\n", (Asked(question, prefix, texts),), f"{before}\n")


def singular(words: str) -> str:
    """RULER's own way to speak of one."""
    return words.replace("Some", "A").replace("are all", "is").replace("are", "is")


def listed(words: list[str]) -> str:
    """`a`, or `a, b, and c`."""
    return ", ".join(words[:-1]) + ", and " + words[-1] if len(words) > 1 else words[0]


class NiahSingle1(Niah):
    """One number in noise."""

    name = "niah_single_1"
    hay = "noise"


class NiahSingle2(Niah):
    """One number in running text."""

    name = "niah_single_2"


class NiahSingle3(Niah):
    """One uuid in running text."""

    name = "niah_single_3"
    value = "uuids"


class NiahMultikey1(Niah):
    """One number of four in running text."""

    name = "niah_multikey_1"
    keys = 4


class NiahMultikey2(Niah):
    """One number among lines that are all needles."""

    name = "niah_multikey_2"
    hay = "needle"


class NiahMultikey3(Niah):
    """The same with uuids for keys and values."""

    name = "niah_multikey_3"
    hay, key, value = "needle", "uuids", "uuids"


class NiahMultivalue(Niah):
    """Four numbers of one key in running text."""

    name = "niah_multivalue"
    values = 4


class NiahMultiquery(Niah):
    """The numbers of four keys in running text."""

    name = "niah_multiquery"
    keys = queries = 4


NIAH = (NiahSingle1, NiahSingle2, NiahSingle3, NiahMultikey1, NiahMultikey2, NiahMultikey3,
        NiahMultivalue, NiahMultiquery)  # fmt: skip
