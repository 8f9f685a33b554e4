"""How an answer in generated text is judged: (text, question) -> a number from 0 to 1.

Right answers are `question.texts`. A task takes any such function; these are the usual ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from os.path import commonprefix

from kvlab.core import BadInput
from kvlab.eval.task import Question

Scorer = Callable[[str, Question], float]


def exact(text: str, question: Question) -> float:
    """Whether the text is one of the right ones, but for space around it."""
    return float(text.strip() in {right.strip() for right in question.texts})


def contains_all(text: str, question: Question) -> float:
    """Share of the right answers that stand in the text, in any case (RULER's)."""
    return sum(right.lower() in text.lower() for right in question.texts) / len(question.texts)


def contains_any(text: str, question: Question) -> float:
    """Whether one of the right answers stands in the text, in any case (RULER's, for questions)."""
    return float(any(right.lower() in text.lower() for right in question.texts))


def copied_prefix(text: str, question: Question) -> float:
    """Share of the right answer that was copied before the first wrong character; of several
    answers the best."""
    shares = (len(commonprefix([text.lstrip(), right.lstrip()])) / len(right.lstrip())
              for right in question.texts)
    return max(shares)


def chosen(text: str, question: Question) -> float:
    """Whether the first of `question.options` that the text names is a right one."""
    places = {option: found.start() for option in question.options
              if (found := re.search(rf"\b{re.escape(option)}\b", text, re.IGNORECASE))}
    first = min(places, key=lambda option: (places[option], -len(option)), default=None)
    return float(first in question.texts)


SCORERS: dict[str, Scorer] = {
    f.__name__: f for f in (exact, contains_all, contains_any, copied_prefix, chosen)
}


def scorer(given: str | Scorer) -> Scorer:
    """A scorer by its name, or itself. Raises `BadInput`."""
    if callable(given):
        return given
    if given not in SCORERS:
        raise BadInput("task.scorer", given, f"known: {', '.join(SCORERS)}")
    return SCORERS[given]
