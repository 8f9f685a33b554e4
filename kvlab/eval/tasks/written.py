"""Tasks with a long answer that is known line by line: for what compresses while decoding.

After LongProc (https://arxiv.org/abs/2501.05414, github.com/princeton-pli/LongProc, Apache-2.0):
countdown, path traversal, and its tables in a form that is drawn instead of taken from web pages;
worded here, shorter, for models that are small. `lines_right` is the score: the share of the right
answer's lines that were written before the first wrong one. Compression lengthens answers, so the
room is a quarter more than the right answer needs, and how long answers were is a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random

from kvlab.eval.task import Question
from kvlab.eval.tasks.drawn import Drawn
from kvlab.eval.tasks.wording import Asked, Prompt
from kvlab.eval.tasks.words import distinct, place


def lines_right(text: str, question: Question) -> float:
    """Share of the right answer's lines before the first wrong one."""
    right = question.texts[0].splitlines()
    told = [line.strip() for line in text.strip().splitlines()]
    wrong = (n for n, line in enumerate(right) if told[n : n + 1] != [line.strip()])
    return next(wrong, len(right)) / len(right)


class Written(Drawn):
    """A member says `lines(units, rng)`: what is read, what is asked, and the lines of the answer.

    Its length is that of the right answer in tokens. START begins the answer.
    """

    right = staticmethod(lines_right)
    counted = "answer_tokens"
    stop = ("\n\n",)
    START = "Answer:\n"

    def fit_to(self, length: int) -> None:
        super().fit_to(length)
        self.new_tokens = self.protocol.new_tokens or length * 5 // 4 + 8

    def lines(self, units: int, rng: Random) -> tuple[str, str, list[str]]:
        raise NotImplementedError

    def prompt(self, units: int, rng: Random) -> Prompt:
        told, question, answer = self.lines(units, rng)
        asked = Asked(question, self.START, ("\n".join(answer),))
        return Prompt(f"{told}\n\n", (asked,), "\n\n")

    def marks(self, text: str, question: Question) -> dict[str, float]:
        """The whole answer counts as exact, not its first line."""
        found = {"score": float(self.scorer(text, question))}
        return found | {"exact": float(found["score"] == 1)}


class TableToText(Written):
    """A sentence for each row of a table, all in one form."""

    name = "table_to_text"
    JOBS = ("baker", "clerk", "farmer", "guard", "lawyer", "miner", "nurse", "pilot", "potter",
            "sailor", "tailor", "teacher")  # fmt: skip

    def lines(self, units: int, rng: Random):
        names = distinct(units, lambda: place(rng))
        rows = [(name, str(rng.randint(20, 79)), rng.choice(self.JOBS), place(rng))
                for name in names]  # fmt: skip
        table = ["| name | age | job | city |", "|---|---|---|---|"]
        table += [f"| {' | '.join(row)} |" for row in rows]
        ask = ("Write one line for each row of the table, in the order of the rows and in this "
               "form, and nothing else:\nNAME is a JOB of AGE years who lives in CITY.")
        answer = [f"{name} is a {job} of {age} years who lives in {city}."
                  for name, age, job, city in rows]  # fmt: skip
        return "\n".join(table), ask, answer


class PathTraversal(Written):
    """The only route between two cities, where each has one connection; half of them lead astray.
    """

    name = "path_traversal"
    START = "Route:\n"
    BY = ("bus", "train", "plane", "ferry")

    def lines(self, units: int, rng: Random):
        cities = distinct(2 * units + 2, lambda: place(rng))
        route, others = cities[: units + 1], cities[units + 1 :]
        legs = [(a, rng.choice(self.BY), b) for a, b in zip(route, route[1:])]
        astray = [(a, rng.choice(self.BY), rng.choice(cities)) for a in others]
        told = [*legs, *astray]
        rng.shuffle(told)
        text = "\n".join(f"From {a} you can travel by {by} to {b}." for a, by, b in told)
        ask = (f"Each city has only one way out. Find the route from {route[0]} to {route[-1]}. "
               "Write one line for each step, in this form, and nothing else:\n"
               "From CITY, take a VEHICLE to CITY.")  # fmt: skip
        return text, ask, [f"From {a}, take a {by} to {b}." for a, by, b in legs]


class Countdown(Written):
    """The search for a sum, written down step by step as the rules say.

    Numbers and target are drawn until the search has at most `units` steps, and at least half as
    many: LongProc's game, its procedure told in fewer words and one example.
    """

    name = "countdown"
    START = "Search:\n"
    least, most = 6, 800  # steps; four numbers have some more
    RULES = (
        "A game: combine numbers until one is left that equals the target. Search like this. "
        "Take the numbers two by two, in order. Let a be the larger and b the smaller. Try a + b, "
        "then a - b, then a * b, then a / b; leave out results that are zero or no whole number. "
        "Write each try on a line, with the numbers that are left, the result last. While two or "
        "more are left, go on with them at once; if one is left and it is not the target, go back "
        "to the last choice. Stop at the target.\n\n"
    )

    def lines(self, units: int, rng: Random):
        example, wanted = game(4, 8, 3, Random("an example of countdown"))
        told = "\n".join(searched(example, wanted))
        numbers, target = game(units // 2, units, 3 if units < 24 else 4, rng)
        text = f"{self.RULES}{stated(example, wanted)}\n{self.START}{told}"
        return text, stated(numbers, target), searched(numbers, target)


def stated(numbers: list[int], target: int) -> str:
    return f"Numbers: {' '.join(map(str, numbers))}\nTarget: {target}"


def game(least: int, most: int, count: int, rng: Random) -> tuple[list[int], int]:
    """Numbers and a target whose search has `least` to `most` steps."""
    while True:
        numbers = [rng.randint(2, 20) for _ in range(count)]
        first: dict[int, int] = {}  # result -> at which step it comes first
        for step, (_, left) in enumerate(islice(tried(numbers), most), 1):
            if len(left) == 1:
                first.setdefault(left[0], step)
        if late := [result for result, step in first.items() if step >= least]:
            return numbers, rng.choice(late)


def searched(numbers: list[int], target: int) -> list[str]:
    """The lines of a search, up to the target."""
    found = []
    for step, left in tried(numbers):
        hit = left == [target]
        found.append(f"{step}, left {' '.join(map(str, left))}" + " = target" * hit)
        if hit:
            break
    return found


def tried(numbers: list[int]) -> Iterator[tuple[str, list[int]]]:
    """Each step of the whole search, depth first, and the numbers that are left behind it."""
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            a, b = sorted((numbers[i], numbers[j]), reverse=True)
            rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
            for sign, result in (("+", a + b), ("-", a - b), ("*", a * b), ("/", a / b)):
                if result > 0 and result == int(result):
                    left = [*rest, int(result)]
                    yield f"{a} {sign} {b} = {int(result)}", left
                    if len(left) > 1:
                        yield from tried(left)


class CopyString(Written):
    """A long string without sense, once more; the score is the share before the first error."""

    name = "copy_string"
    START = "Text:\n"
    right = "copied_prefix"
    copies = True

    def lines(self, units: int, rng: Random):
        told = ["".join(rng.choices("abcdefghjkmnpqrstuvwxyz23456789", k=12))
                for _ in range(units)]  # fmt: skip
        ask = "Copy the text above exactly, line by line, and write nothing else."
        return self.START + "\n".join(told), ask, told

    def marks(self, text: str, question: Question) -> dict[str, float]:
        found = super().marks(text, question)
        return found | {"copied": found["score"]}
