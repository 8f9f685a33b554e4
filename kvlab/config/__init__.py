"""Hydra's side of the house: compose, refuse, expand variants. No other room imports Hydra."""

from kvlab.config.advising import advice, pages
from kvlab.config.explain import complaint, explain
from kvlab.config.line import given_options, parse_line
from kvlab.config.listing import listing
from kvlab.config.overrides import first_of_sweep, quote
from kvlab.config.paths import add_config_dir, conf_dir
from kvlab.config.plan import Plan, built, make_plan
from kvlab.config.sweep import conclude, given, overrides_of, sweep_of, task_of

__all__ = [
    "Plan", "add_config_dir", "advice", "built", "complaint", "conclude", "conf_dir", "explain",
    "first_of_sweep", "given", "given_options", "listing", "make_plan", "overrides_of", "pages",
    "parse_line", "quote", "sweep_of", "task_of",
]  # fmt: skip
