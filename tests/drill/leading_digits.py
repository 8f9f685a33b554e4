"""A task as a user writes it: one file, outside the package."""

from __future__ import annotations

import numpy as np

from kvlab.eval import Asking, Item, Question


def leading(text: str, question: Question) -> float:
    """Share of the code's digits that were said before the first wrong one."""
    right, told = question.texts[0], text.strip()
    wrong = (n for n, digit in enumerate(right) if told[n : n + 1] != digit)
    return next(wrong, len(right)) / len(right)


class LeadingDigits(Asking):
    """Two codes near the ends of a text; the model says one and then the other, in its own words.

    tokens: of text. texts: how many.
    """

    name = "leading_digits"
    stop = (".", "\n")

    def __init__(self, tokens: int = 160, texts: int = 2, query_aware: bool = False):
        super().__init__(32, query_aware, new_tokens=10, scorer=leading)
        self.tokens, self.texts = tokens, texts

    def params(self):
        return super().params() | {"tokens": self.tokens}

    def items(self, model, data, seed):
        def ids(text):
            return np.array(model.tokenizer(text, add_special_tokens=False)["input_ids"])

        documents = data.documents(model.tokenizer, self.texts, self.tokens)
        for number, document in enumerate(documents):
            draw = np.random.default_rng([seed, number])
            codes = [str(code) for code in draw.choice(899_999, 2, replace=False) + 100_000]
            facts = [ids(f" The secret number of {place} is {code}.")
                     for place, code in zip(("river stone", "winter lamp"), codes)]
            text = np.array(document.ids)
            questions = tuple(
                Question(ids(f" What is the secret number of {place}? "
                             f"The secret number of {place} is"), texts=(code,), tags={"at": at})
                for place, code, at in zip(("river stone", "winter lamp"), codes, ("start", "end"))
            )
            context = np.concatenate([text[:16], facts[0], text[16:-16], facts[1], text[-16:]])
            yield Item(document.id, context, questions)
