"""What a member given by its class is called."""

from __future__ import annotations

import pytest

from kvlab.axes import label, of_members
from kvlab.core import BadInput


@pytest.mark.parametrize("settings", [
    {"policy._target_": "kvlab.policy.LFU", "cache.budget_percent": 10},
    {"policy": "lru", "cache.budget_percent": 10, "policy._target_": "kvlab.policy.LFU"},
    {"policy._target_": "kvlab.policy.LFU", "policy": "lru", "cache.budget_percent": 10},
])  # fmt: skip
def test_a_class_stands_in_place_of_the_option_it_is_laid_over(settings):
    assert of_members(settings) == {"policy": "lfu", "cache.budget_percent": 10}
    assert label(of_members(settings)) == "lfu 10%"


def test_other_settings_stay_as_they_are():
    settings = {"format": "int8", "model._target_": "x.Y", "policy.seed": 3}
    assert of_members(settings) == settings


def test_a_class_that_is_not_there_is_refused():
    with pytest.raises(BadInput, match="policy=no_such.Policy: cannot be imported"):
        of_members({"policy._target_": "no_such.Policy"})
