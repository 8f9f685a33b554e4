"""Which cache for a goal, a model and a memory: bytes by formula, losses as they were measured."""

from kvlab.advice.ask import Ask, parse
from kvlab.advice.choices import Choice, choices
from kvlab.advice.table import losses
from kvlab.advice.tell import advise

__all__ = ["Ask", "Choice", "advise", "choices", "losses", "parse"]
