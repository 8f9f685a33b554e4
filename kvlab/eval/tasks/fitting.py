"""Items of a task that is drawn (`task`, a `Drawn`): the same dice everywhere, and as much haystack
as fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from kvlab.core import BadInput
from kvlab.eval.task import Item
from kvlab.eval.tasks.wording import Wording


def dice(task, *words) -> Random:
    """For an item, or for a throw-away sample; seeded by text, so the same everywhere."""
    return Random(" ".join(map(str, (task.seed, task.name, task.length, *words))))


def drawn(task, tokenizer: Callable, seed: int) -> Iterator[Item]:
    """All items of `task`; raises `BadInput` for a length that does not hold one."""
    task.seed = seed
    wording = Wording(tokenizer, task.protocol.chat)
    units = task.units(wording)
    for number in range(task.protocol.samples):
        task.turn_to(number)
        yield fitted(task, wording, max(units, task.least), number)


def fitted(task, wording: Wording, units: int, number: int) -> Item:
    """An item at so many units, or fewer, until it fits; raises `BadInput` where none does."""
    while units >= task.least:
        prompt = task.prompt(units, dice(task, "item", number))
        item = wording.item(f"{task.name}, item {number + 1}", prompt, task.turns)
        if fits(task, item, wording):
            return item
        units -= task.step
    raise BadInput("eval.lengths", task.length, f"{task.name} needs more tokens than that: "
                   "question, answer and the least of a haystack do not fit")


def largest(task, wording: Wording) -> int:
    """The most units that fit, each size tried with a sample that is thrown away."""
    def fit(units: int) -> bool:
        prompt = task.prompt(units, dice(task, "size", units))
        return fits(task, wording.item("", prompt, task.turns), wording)

    low, high, most = task.least, task.least + 1, task.most
    while high < most and fit(high):
        low, high = high, min(2 * high, most)
    if high == most and fit(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def fits(task, item: Item, wording: Wording) -> bool:
    """Whether a task's length holds the prompt and what is generated behind it; or, where it is
    that of the answer, the right one."""
    if task.counted == "answer_tokens":
        [question] = item.questions
        return len(wording.tokenizer(question.texts[0])["input_ids"]) <= task.length
    asked = [len(question.ids) + task.new_tokens for question in item.questions]
    behind = sum(asked) if task.turns else max(asked)
    return len(item.context) + behind <= task.length
