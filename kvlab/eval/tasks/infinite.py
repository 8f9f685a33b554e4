"""InfiniteBench's four tasks that need no data, https://arxiv.org/abs/2402.13718.

Wording and generators are those of github.com/OpenBMB/InfiniteBench at 88b3daa (MIT). What
differs: prompts are fitted to a length in the model's tokens, where theirs have one size; depths
are drawn, where theirs are a grid; an answer begins with the words of their templates for base
models ("The pass key is"), so that a small model has nothing to do but to copy.
"""

from __future__ import annotations

import re
from random import Random

from kvlab.core import BadInput
from kvlab.eval.task import Question
from kvlab.eval.tasks.drawn import Drawn
from kvlab.eval.tasks.protocol import Protocol
from kvlab.eval.tasks.wording import Asked, Prompt
from kvlab.eval.tasks.words import NOISE, uuid


class Passkey(Drawn):
    """A key of digits told once, twice in its line, among lines of noise.

    digits: of the key; theirs has 5.
    """

    name = "passkey"
    generates = 6
    copies = True
    settings = ("digits",)
    BEFORE = ("There is an important info hidden inside a lot of irrelevant text. Find it and "
              "memorize them. I will quiz you about the important information there.\n\n")
    KEY = "pass key"

    def __init__(self, protocol: Protocol | None = None, digits: int = 5):
        if not 1 <= digits <= 1000:
            raise BadInput("task.digits", digits, "must lie between 1 and 1000")
        self.digits = digits
        self.generates = digits + max(1, digits // 5)
        super().__init__(protocol)

    def key(self, rng: Random) -> str:
        return "".join(str(rng.randint(0, 9)) for _ in range(self.digits))

    def prompt(self, units: int, rng: Random) -> Prompt:
        key, lines = self.key(rng), [NOISE] * units
        told = f"The {self.KEY} is {key}. Remember it. {key} is the {self.KEY}."
        depth = rng.randint(0, units)
        lines.insert(depth, told)
        tags = {"depth_percent": 10 * round(10 * depth / units)}
        asked = Asked(f"What is the {self.KEY}?", f"The {self.KEY} is", (key,), tags)
        context = "\n".join(lines)
        return Prompt(f"{self.BEFORE}{context}\n\n\n", (asked,), f"{self.BEFORE}\n\n")


class NumberString(Passkey):
    """Ten digits, five of them drawn and then five times one doubled in place: hard to copy."""

    name = "number_string"
    generates = 12
    settings = ()
    BEFORE = ("There is an important info hidden inside a lot of irrelevant text. Find it. I will "
              "quiz you about the important information there.\n\n")
    KEY = "sequence of digits"

    def __init__(self, protocol: Protocol | None = None):
        super().__init__(protocol, digits=10)

    def key(self, rng: Random) -> str:
        digits = [str(rng.randint(0, 9)) for _ in range(5)]
        while len(digits) < 10:
            at = rng.randint(0, len(digits) - 1)
            digits.insert(at, digits[at])
        return "".join(digits)


class KvRetrieval(Drawn):
    """The value of one key of a JSON object of uuids."""

    name = "kv_retrieval"
    generates = 50
    copies = True
    stop = ("\n",)
    BEFORE = "Extract the value corresponding to the specified key in the JSON object below.\n\n"

    def prompt(self, units: int, rng: Random) -> Prompt:
        pairs = [(uuid(rng), uuid(rng)) for _ in range(units)]
        at = rng.randrange(units)
        tags = {"depth_percent": 10 * round(10 * at / units)}
        context = f"{self.BEFORE}{as_json(pairs)}\n\n"
        return Prompt(context, (looked_up(*pairs[at], tags),), f"{self.BEFORE}{as_json([])}\n\n")


def as_json(pairs: list[tuple[str, str]]) -> str:
    told = ", ".join(f'"{key}": "{value}"' for key, value in pairs)
    return f"JSON data:\n{{{told}}}"


def looked_up(key: str, value: str, tags: dict) -> Asked:
    """Their question ends in a space; here it stands behind the assistant's header without it."""
    return Asked(f'Key: "{key}"', "The value associated with the specified key is:", (value,), tags)


ASKED = {  # what is asked: its place in the sorted list of distinct numbers
    "largest number": -1, "second largest number": -2, "third largest number": -3,
    "smallest number": 0, "second smallest number": 1, "third smallest number": 2, "median": None,
}  # fmt: skip


def first_number(text: str, question: Question) -> float:
    """Whether the first whole number of the text is the right one (InfiniteBench's)."""
    found = re.search(r"\d+", text)
    return float(found is not None and found.group() in question.texts)


class MathFind(Drawn):
    """One of seven numbers of a long list of 0 to 99: largest, second smallest, median, ...

    The list's range is drawn: up to a fifth is cut off at the side that is asked for. The second
    and third of a list are those of its distinct numbers.
    """

    name = "math_find"
    generates = 3
    right = staticmethod(first_number)
    least = 5

    def prompt(self, units: int, rng: Random) -> Prompt:
        what = rng.choice(list(ASKED))
        low = rng.randint(0, 20) if "smallest" in what else 0
        high = rng.randint(79, 99) if "largest" in what else 99
        numbers = [rng.randint(low, high) for _ in range(units)]
        before = f"Find the {what} from the list below:\n\n"
        asked = Asked("You should answer with only one number, no other words. "
                      f"The {what} of the list is:", "", (found_in(numbers, what),),
                      {"asked": what})
        return Prompt(f"{before}{numbers}\n\n", (asked,), f"{before}[]\n\n")


def found_in(numbers: list[int], what: str) -> str:
    """The right answer; a median of an even count is the lower of the two in the middle."""
    place, distinct = ASKED[what], sorted(set(numbers))
    if place is None:
        return str(sorted(numbers)[(len(numbers) - 1) // 2])
    return str(distinct[place] if -len(distinct) <= place < len(distinct) else distinct[-1])
