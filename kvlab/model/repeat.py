"""The second pass of KVzip: the model repeats the context that a cache holds, piece by piece."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from kvlab.core import BadInput
from kvlab.model.chunk import run_chunk

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
LAST_TOKENS = 8  # of the piece before, behind `LATER`
MARK = "\n########"


class Repeater:
    """Knows the tokens of the context that a cache is being filled with, and has it repeated.

    KVzip (Kim et al. 2025, https://arxiv.org/abs/2505.23416): each piece of the context is read
    again behind a prompt that asks for it, and tokens that nothing looks at meanwhile leave. The
    repetition is forgotten again. piece: context tokens repeated at a time.
    Costs about twice the prefill. Raises `BadInput` without a tokenizer, which writes the prompts.
    """

    def __init__(self, model, tokenizer, piece: int):
        if tokenizer is None:
            raise BadInput("policy", "kvzip", "asks the model to repeat the context and needs the "
                           "tokenizer: PagedCache.for_model(model, spec, tokenizer=tokenizer)")
        self.model, self.tokenizer, self.piece = model, tokenizer, piece
        self._context = torch.zeros(0, 0, dtype=torch.long)  # [B, T], never written in place

    def __deepcopy__(self, memo: dict) -> Repeater:
        """For a copy of its cache: model and tokenizer are not copied."""
        other = memo[id(self)] = copy.copy(self)
        return other

    def admit(self) -> None:
        """Asked by the cache at each forward; the cache itself refuses those out of place."""

    def before(self, ids: Tensor, cache) -> None:
        """The chunk `ids` [B, T] comes next, behind what the cache holds: one before it may have
        failed, or been forgotten."""
        if cache.core.shares.filling:
            held = self._context[:, : cache.seen]
            self._context = torch.cat((held, ids), 1) if len(held) == len(ids) else ids

    def select(self, sources: list[int]) -> None:
        """Row i of the cache is what row `sources[i]` was."""
        known = max(sources, default=-1) < len(self._context)  # not rows of another driver
        self._context = self._context[sources if known else []]

    @torch.inference_mode()
    def ended(self, cache) -> None:
        """The context is over: have it repeated, and give up what was not looked at.

        Raises `BadInput` where rows have padding, whose tokens no cache holds.
        """
        context = self._context
        total = context.shape[1]
        if any(cache.core.requests.length(row) != total for row in cache.rows):
            raise BadInput("policy", "kvzip", "repeats rows of one length without padding; give "
                           "prompts of unlike lengths caches of their own")
        for start in range(0, total, self.piece):
            end = min(total, start + self.piece)
            asked = torch.cat((self._prompt(context, start), context[:, start:end]), 1)
            with cache.core.repeating(start, end):
                run_chunk(self.model, asked, cache, last=True)
            cache.crop(-asked.shape[1])
        cache.core.compress()

    def _prompt(self, context: Tensor, start: int) -> Tensor:
        """What asks for the piece from `start` on, [B, n]."""
        told = self._tokens(LATER if start else FIRST, context)
        last = context[:, max(0, start - LAST_TOKENS) : start]
        return torch.cat((told, last, self._tokens(self._answering(), context)), 1)

    def _tokens(self, text: str, context: Tensor) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([ids], dtype=context.dtype, device=context.device).expand(
            len(context), -1)

    def _answering(self) -> str:
        """What the chat template writes behind a question, before an answer."""
        if not getattr(self.tokenizer, "chat_template", None):
            return "\n"
        whole = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True,
            enable_thinking=False,  # only templates that know it look at it
        )
        return whole.rpartition(MARK.strip())[2]
