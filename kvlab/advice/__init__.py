"""Which cache for a goal, a model and a memory: bytes by formula, losses as they were measured."""

from kvlab.advice.ask import GOALS, Ask, parse
from kvlab.advice.choices import Choice, choices
from kvlab.advice.table import losses
from kvlab.advice.tell import advise, advised, shown

__all__ = ["GOALS", "Ask", "Choice", "advise", "advised", "choices", "losses", "parse", "shown"]
