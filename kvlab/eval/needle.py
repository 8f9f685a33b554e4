"""AXIS needle: facts hidden in a document at chosen depths, and the questions that ask for them.

After Kamradt's "needle in a haystack" (https://github.com/gkamradt/LLMTest_NeedleInAHaystack) and
the synthetic recall of RULER (https://arxiv.org/abs/2404.06654). Differs: the answer is one code of
random digits that stands nowhere else, the question ends where the code has to follow, and an
answer is right if greedy decoding gives exactly the code. Nobody has to judge free text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvlab.core import BadInput
from kvlab.eval.data import Document
from kvlab.eval.task import Item, Question

_NOUNS = (
    "river garden winter silver mountain letter window castle forest bridge candle harbor island "
    "meadow mirror morning orchard palace pocket ribbon saddle shadow summer temple thunder tower "
    "valley velvet village violet wagon whisper anchor barrel basket blossom button carpet chapel "
    "cottage crystal feather hammer kitchen ladder lantern marble needle parlor pepper pillow "
    "prison rabbit scarlet shepherd spider stable throne turkey vessel widow yellow golden humble"
)
WORDS = tuple(_NOUNS.split())
SENTENCE_TOKENS = 48  # a fact goes behind the last sentence that ended within so many tokens


class SecretNumber:
    """The task that the bundled reference model was trained on; needs no instruction tuning.

    digits: of a code; 5 to 7 are what the reference model has seen.
    """

    name = "secret_number"

    def __init__(self, digits: int = 6):
        if not 1 <= digits <= 15:
            raise BadInput("digits", digits, "must lie between 1 and 15")
        self.digits = digits

    def fact(self, thing: str, code: str) -> str:
        return f" The secret number of {thing} is {code}."

    def question(self, tokenizer: Callable, thing: str) -> str:
        return f" What is the secret number of {thing}? The secret number of {thing} is"

    def answer(self, code: str) -> str:
        return f" {code}."

    def head(self, tokenizer: Callable) -> list[int]:
        """What stands before the document: the tokens that the tokenizer begins a text with."""
        return list(tokenizer("")["input_ids"])

    def prompt(
        self, tokenizer: Callable, document: Document, length: int, depths: Sequence[float],
        rng: np.random.Generator,
    ) -> Item:
        """A context of exactly `length` tokens with one fact at each of `depths` (percent).

        The text is a piece of `document` at a place that `rng` draws. Raises `BadInput` where the
        facts leave no room for text or the document is too short.
        """
        things, codes = self._draw(len(depths), rng)
        facts = [encode(tokenizer, self.fact(*pair)) for pair in zip(things, codes)]
        begin, head = len(tokenizer("")["input_ids"]), self.head(tokenizer)
        text = document.ids[begin:]
        room = length - len(head) - sum(map(len, facts))
        if room < 2 * SENTENCE_TOKENS:
            remedy = f"leaves {room} tokens of text beside {len(facts)} facts"
            raise BadInput("eval.lengths", length, remedy)
        if room > len(text):
            remedy = f"document {document.id} has {len(text)} tokens only"
            raise BadInput("eval.lengths", length, remedy)
        start = int(rng.integers(0, len(text) - room + 1))
        context = [*head, *insert(tokenizer, text[start : start + room], facts, depths)]
        questions = [
            Question(
                np.array(encode(tokenizer, self.question(tokenizer, thing))),
                np.array(encode(tokenizer, self.answer(code))), texts=(code,),
                tags={"depth_percent": depth},
            )
            for depth, thing, code in zip(depths, things, codes)
        ]
        return Item(document.id, np.array(context, dtype=np.int64), tuple(questions))

    def _draw(self, count: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
        """Names of two words and codes; no word and no code comes twice in a prompt."""
        words = rng.choice(WORDS, 2 * count, replace=False)
        low, high = 10 ** (self.digits - 1), 10**self.digits
        codes = low + rng.choice(high - low, count, replace=False)
        return [f"{a} {b}" for a, b in zip(words[::2], words[1::2])], [str(c) for c in codes]


class ChatNeedle(SecretNumber):
    """The same for instruction-tuned models, through their own chat template.

    The document stands in the user's turn, the question at its end; the assistant's turn is begun
    ("The access code of ... is"), so that what has to follow is the code. Templates that know
    `enable_thinking` are asked not to. Raises `BadInput` where a tokenizer has no template.
    digits: of a code.
    """

    name = "chat"
    _HERE = "\u2063"  # an invisible separator: marks the document's place in the template
    _TASK = "Read this text. Access codes are hidden in it; remember them.\n\n"

    def fact(self, thing: str, code: str) -> str:
        return f" The access code of the {thing} is {code}."

    def question(self, tokenizer: Callable, thing: str) -> str:
        asked = f"\n\nWhat is the access code of the {thing}? Answer with the code only."
        return self._turn(tokenizer, asked)[1] + f"The access code of the {thing} is"

    def answer(self, code: str) -> str:
        return f" {code}"

    def head(self, tokenizer: Callable) -> list[int]:
        return encode(tokenizer, self._turn(tokenizer, "")[0])

    def _turn(self, tokenizer: Callable, asked: str) -> tuple[str, str]:
        """The template's text before and after the document."""
        if not getattr(tokenizer, "chat_template", None):
            raise BadInput(
                "needle", self.name,
                "the model's tokenizer has no chat template; needle=secret_number needs none",
            )
        content = f"{self._TASK}{self._HERE}{asked}"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True,
            enable_thinking=False,
        )
        before, _, after = text.partition(self._HERE)
        return before, after


def encode(tokenizer: Callable, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def insert(
    tokenizer: Callable, text: np.ndarray, facts: list[list[int]], depths: Sequence[float]
) -> list[int]:
    """`text` with each fact behind the sentence that ends before its depth, in percent of text."""
    pieces, last = [], 0
    for depth, fact in sorted(zip(depths, facts), key=lambda pair: pair[0]):
        at = max(last, _sentence_end(tokenizer, text, round(len(text) * depth / 100)))
        pieces += [*text[last:at], *fact]
        last = at
    return [int(i) for i in (*pieces, *text[last:])]


def _sentence_end(tokenizer: Callable, text: np.ndarray, at: int) -> int:
    """The last place up to `at` behind a full stop; `at` where none is near."""
    for place in range(at, max(0, at - SENTENCE_TOKENS), -1):
        if tokenizer.decode([int(text[place - 1])]).rstrip().endswith((".", "!", "?")):
            return place
    return at
