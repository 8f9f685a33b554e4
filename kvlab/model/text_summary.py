"""Summary in words: the model retells what is about to be dropped, and reads its own words."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor

from kvlab.core import BadInput, KvlabError
from kvlab.model.chunk import run_chunk
from kvlab.summary import NoSummary

PROMPT = (
    "Summarize the following passage in at most {words} words. Keep names, numbers, places and "
    "facts that later text may refer to. Answer with the summary only.\n\n{text}"
)
TOLD = "\n[Summary of what came before: {text}]\n"
WORDS_PER_TOKEN = 0.7  # of English, roughly; what the prompt asks for, the token limit holds anyway
THOUGHTS = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


class TextSummary(NoSummary):
    """An instruction-tuned model summarizes the text of the oldest tokens; that text is prefilled.

    What agents do to their transcripts, here behind the cache's `summary` axis. Before a chunk,
    a cache with more than `budget_tokens` is written anew: `sinks` first tokens, the summary of all
    between (an older summary included), and the `recent` last tokens. Positions start over, so
    nothing of the old keys and values is reused; that prefill is part of the price.
    budget_tokens: may be in the cache when a chunk begins. max_tokens: of a summary.
    prompt: with {words} and {text}.
    Works in chunks through kvlab's own drivers, one row; needs a tokenizer with a chat template.
    """

    name = "text"
    stands = True

    def __init__(
        self, budget_tokens: int = 4096, max_tokens: int = 256, sinks: int = 4,
        recent: int = 1024, prompt: str = PROMPT,
    ):
        limits = {"budget_tokens": (budget_tokens, 1), "max_tokens": (max_tokens, 1),
                  "sinks": (sinks, 0), "recent": (recent, 1)}  # fmt: skip
        for key, (value, least) in limits.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadInput(f"summary.{key}", value, f"must be a whole number, at least {least}")
        if sinks + max_tokens + recent >= budget_tokens:
            raise BadInput("summary.budget_tokens", budget_tokens, "must exceed sinks, max_tokens "
                           f"and recent together, which are {sinks + max_tokens + recent}")
        if "{text}" not in prompt:
            raise BadInput("summary.prompt", prompt, "must contain {text}")
        self.budget_tokens, self.max_tokens, self.prompt = budget_tokens, max_tokens, prompt
        self.sinks, self.recent = sinks, recent

    def teller(self, model, tokenizer, cache) -> Teller:
        """Who rewrites `cache` in time. Raises `BadInput` without a chat template."""
        if tokenizer is None:
            raise BadInput("summary", self.name, "needs the tokenizer: "
                           "PagedCache.for_model(model, spec, tokenizer=tokenizer)")
        if not getattr(tokenizer, "chat_template", None):
            raise BadInput("summary", self.name, "asks the model in its chat format, and this "
                           "tokenizer has no chat template; take an instruction-tuned model or "
                           "summary=merged")
        return Teller(self, model, tokenizer, cache)


class Teller:
    """Knows the tokens of one cache, and writes it anew with a summary when there are too many.

    told: the summaries so far, as texts.
    """

    def __init__(self, summary: TextSummary, model, tokenizer, cache):
        self.summary, self.model, self.tokenizer, self.cache = summary, model, tokenizer, cache
        self.tokens: list[int] = []
        self.told: list[str] = []
        self._due = False

    def __deepcopy__(self, memo: dict) -> Teller:
        """For a copy of its cache: model and tokenizer are not copied."""
        other = memo[id(self)] = copy.copy(self)
        other.cache = copy.deepcopy(self.cache, memo)
        other.tokens, other.told = list(self.tokens), list(self.told)
        return other

    def admit(self) -> None:
        """Asked by the cache at each forward. Raises where its tokens did not pass `before`."""
        due, self._due = self._due, False
        if not due:
            raise KvlabError("summary=text has to see tokens before they are computed, and "
                             "generate() of transformers does not show them; use kvlab.prefill "
                             "and kvlab's own decoding")

    def select(self, sources: list[int]) -> None:
        """Rows were selected: there is one, or `before` says so."""

    def ended(self, cache) -> None:
        """A context is over; a summary does not wait for that."""

    def before(self, ids: Tensor, cache) -> None:
        """Make room for the chunk `ids` [1, T], which its caller runs next."""
        if ids.shape[0] != 1:
            raise BadInput("summary", self.summary.name, "tells one sequence at a time; "
                           f"the batch has {ids.shape[0]} rows")
        if not self.cache.seen:
            self.tokens = []
        if self.cache.seen != len(self.tokens):
            raise KvlabError(f"the cache holds {self.cache.seen} tokens and summary=text knows of "
                             f"{len(self.tokens)}: rows that were cropped cannot go on; start anew")
        if len(self.tokens) > self.summary.budget_tokens:
            self._rewrite()
        self.tokens += ids[0].tolist()
        self._due = True

    def _rewrite(self) -> None:
        head, rest = self.tokens[: self.summary.sinks], self.tokens[self.summary.sinks :]
        middle, recent = rest[: -self.summary.recent], rest[-self.summary.recent :]
        self.told.append(self.summarize(middle))
        words = self._plain(TOLD.format(text=self.told[-1]))[: self.summary.max_tokens]
        self.tokens = head + words + recent
        self.cache.reset()
        self._run(self.cache, self.tokens)

    @torch.inference_mode()
    def summarize(self, tokens: list[int]) -> str:
        """The model's own summary of the text of `tokens`; greedy, through a cache of its own."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        words = max(1, int(self.summary.max_tokens * WORDS_PER_TOKEN))
        asked = self.summary.prompt.replace("{words}", str(words)).replace("{text}", text)
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True,
            enable_thinking=False,  # only templates that know it look at it
        )
        scratch = type(self.cache).for_model(self.model, format=self.cache.spec.format)
        logits = self._run(scratch, self._plain(prompt))
        said: list[int] = []
        while len(said) < self.summary.max_tokens:
            token = int(logits[0, -1].argmax())
            if token in self._ends():
                break
            said.append(token)
            logits = self._run(scratch, [token])
        scratch.reset()
        answer = self.tokenizer.decode(said, skip_special_tokens=True)
        return THOUGHTS.sub("", answer).strip()

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _ends(self) -> set[int]:
        config = getattr(self.model, "generation_config", None)
        found = [getattr(config, "eos_token_id", None), self.tokenizer.eos_token_id]
        lists = [e if isinstance(e, list) else [e] for e in found]
        return {e for ends in lists for e in ends if e is not None}

    @torch.inference_mode()
    def _run(self, cache, tokens: list[int]) -> Tensor:
        """Logits [1, 1, V] after `tokens`, in chunks of at most `recent` and without this hook."""
        logits, size = None, max(self.summary.recent, self.summary.max_tokens)
        for start in range(0, len(tokens), size):
            ids = torch.tensor([tokens[start : start + size]], device=self.model.device)
            self._due = cache is self.cache
            logits = run_chunk(self.model, ids, cache, last=True)
        return logits

