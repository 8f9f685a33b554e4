"""RULER's variable tracking, common words and frequent words, https://arxiv.org/abs/2404.06654.

Definitions and wording are those of github.com/NVIDIA/RULER at c3f5e3b (Apache-2.0); what differs
are the random numbers, and that names of one chain never repeat.
"""

from __future__ import annotations

from functools import lru_cache
from math import pi
from random import Random
from string import ascii_lowercase

from kvlab.core import BadInput
from kvlab.eval.tasks.drawn import Drawn
from kvlab.eval.tasks.fitting import dice, fits
from kvlab.eval.tasks.wording import Asked, Prompt, Wording
from kvlab.eval.tasks.words import NOISE, capitals, distinct, word_list

SHORT = 4096  # tokens below which RULER takes smaller steps and fewer repetitions


class VariableTracking(Drawn):
    """Which five names hold a value that was handed on from one to the next, in noise."""

    name = "vt"
    generates = 30
    exactly = False
    least, hops = 5, 4
    BEFORE = ("Memorize and track the chain(s) of variable assignment hidden in the following "
              "text.\n\n")  # fmt: skip
    QUESTION = ("Question: Find all variables that are assigned the value {query} in the text "
                "above.")  # fmt: skip
    PREFIX = (" Answer: According to the chain(s) of variable assignment in the text above, {num_v}"
              " variables are assigned the value {query}, they are: ")  # fmt: skip
    example_tokens = 500  # of the worked example, at most

    lines = 5  # of the worked example

    def fit_to(self, length: int) -> None:
        super().fit_to(length)
        self.step = 5 if length < SHORT else 10

    def units(self, wording: Wording) -> int:
        """The worked example has the same lines in all items, as many as fit."""
        lines, most = 5, self.example_tokens
        while lines < most and most >= len(
                wording.tokenizer(self._example(lines + 1, dice(self, "example"))[0])["input_ids"]):
            lines += 1
        self.lines = lines
        return super().units(wording)

    def prompt(self, units: int, rng: Random) -> Prompt:
        names, about, context = chain_of(self.hops, units, 5, rng, rng)
        worked, answer = self._example(self.lines, rng)
        before = f"{worked} {' '.join(answer)}\n\n{self.BEFORE}"
        asked = Asked(self.QUESTION.format(**about), self.PREFIX.format(**about), tuple(names))
        return Prompt(f"{before}{context}\n", (asked,), f"{before}\n")

    def _example(self, lines: int, rng: Random) -> tuple[str, list[str]]:
        """A prompt with names of three letters, the same in all items but for names and value."""
        places = dice(self, "example's places")
        names, about, context = chain_of(self.hops, lines, 3, rng, places)
        return f"{self.BEFORE}{context}\n{self.QUESTION}{self.PREFIX}".format(**about), names


def chain_of(hops: int, lines: int, letters: int, rng: Random, places: Random):
    """Names, what the question says of the value that all have, and the text."""
    names = distinct(hops + 1, lambda: capitals(letters, rng))
    value = str(rng.randint(10_000, 99_998))
    context = hidden_chain(names, value, [NOISE] * lines, places)
    return names, {"query": value, "num_v": hops + 1}, context


def hidden_chain(names: list[str], value: str, lines: list[str], rng: Random) -> str:
    """`lines` with one assignment for each name among them, in order."""
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:])]
    lines = list(lines)
    for number, at in enumerate(sorted(rng.sample(range(len(lines)), len(chain)))):
        lines.insert(at + number, chain[number])
    return "\n".join(lines).replace(". \n", ".\n")


class CommonWords(Drawn):
    """The ten words of a numbered list that come more often than the others."""

    name = "cwe"
    generates = 120
    exactly = False
    step, least, common = 10, 11, 10
    BEFORE = ("Below is a numbered list of words. In these words, some appear more often than "
              "others. Memorize the ones that appear most often.\n")  # fmt: skip
    QUESTION = "Question: What are the 10 most common words in the above list?"
    PREFIX = " Answer: The top 10 words that appear most often in the list are:"

    def units(self, wording: Wording) -> int:
        self.most = len(vocabulary(self.seed))
        return super().units(wording)

    def prompt(self, units: int, rng: Random) -> Prompt:
        small = self.length < SHORT
        listed, right = self._list(20 if small else 40, 3 if small else 10, 1 if small else 3, rng)
        words = f"{self.BEFORE}{listed}\n{self.QUESTION}{self.PREFIX} {numbered(right)}\n"
        listed, right = self._list(units, 6 if small else 30, 1 if small else 3, rng)
        asked = Asked(self.QUESTION, self.PREFIX, tuple(right))
        before = words + self.BEFORE
        return Prompt(f"{before}{listed}\n", (asked,), f"{before}\n")

    def _list(self, words: int, often: int, seldom: int, rng: Random) -> tuple[str, list[str]]:
        chosen = rng.sample(vocabulary(self.seed), words)
        common, others = chosen[: self.common], chosen[self.common :]
        told = common * often + others * seldom
        Random(self.seed).shuffle(told)  # one order for all lists of a length, as RULER has it
        return numbered(told), common


def numbered(words: list[str]) -> str:
    return " ".join(f"{n}. {word}" for n, word in enumerate(words, 1))


@lru_cache
def vocabulary(seed: int) -> tuple[str, ...]:
    """All nouns, adjectives and verbs, each once, shuffled."""
    found = sorted({w for kind in ("noun", "adjective", "verb") for w in word_list(kind)})
    Random(seed).shuffle(found)
    return tuple(found)


class FrequentWords(Drawn):
    """The three most frequent coded words but for the dots; counts fall as 1/k^2."""

    name = "fwe"
    generates = 50
    exactly = False
    letters, per_word = 6, 50
    BEFORE = ("Read the following coded text and track the frequency of each coded word. Find the "
              "three most frequently appeared coded words. ")  # fmt: skip
    QUESTION = ("Question: Do not provide any explanation. Please ignore the dots '....'. What are "
                "the three most frequently appeared words in the above coded text?")  # fmt: skip
    PREFIX = (" Answer: According to the coded text above, the three most frequently appeared "
              "words are:")  # fmt: skip

    def units(self, wording: Wording) -> int:
        """Occurrences: from a sixth of the tokens on, in steps of a 32nd, while they fit."""
        frame = wording.item("", Prompt("", (Asked("", "", ()),), ""))
        self.room = self.length - self.new_tokens - len(frame.tokens())
        if self.room < 4 * self.per_word:
            raise BadInput("eval.lengths", self.length, f"{self.name} needs four coded words, of "
                           f"{self.per_word} tokens of text each, beside its question")
        self.step, units = max(1, self.room // 32), self.room // self.letters
        while fits(self, wording.item("", self.prompt(units, dice(self, "size"))), wording):
            units += self.step
        return units - self.step

    def prompt(self, units: int, rng: Random) -> Prompt:
        coded = sorted(distinct(self.room // self.per_word, lambda: "".join(
            rng.choices(ascii_lowercase, k=self.letters))))  # fmt: skip
        Random(self.seed).shuffle(coded)
        coded[0] = "..."
        counts = [int(units * rank**-2 * 6 / pi**2) for rank in range(1, len(coded) + 1)]
        told = [word for word, count in zip(coded, counts) for _ in range(count)]
        Random(self.seed).shuffle(told)
        asked = Asked(self.QUESTION, self.PREFIX, tuple(coded[1:4]))
        return Prompt(f"{self.BEFORE}{' '.join(told)}\n", (asked,), f"{self.BEFORE}\n")
