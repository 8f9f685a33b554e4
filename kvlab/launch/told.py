"""What a user reads at the end of a sweep."""

from __future__ import annotations

from collections.abc import Mapping

from kvlab.launch.task import Outcome, told


def failures_told(outcomes: Mapping[int, Outcome]) -> str:
    """The runs without success, each with its reason and the command that repeats it; "" where
    all succeeded."""
    failed = {number: o for number, o in outcomes.items() if o.status != 0}
    if not failed:
        return ""
    lines = [f"{len(failed)} of {len(outcomes)} runs failed:"]
    for number, outcome in failed.items():
        tries = f" ({outcome.attempts} times)" if outcome.attempts > 1 else ""
        lines.append(f"  {number}: {outcome.reason or 'it is still at work'}{tries}")
        lines.append(f"     {told(outcome.words, outcome.folder)}")
    return "\n".join(lines)


def worst(outcomes: Mapping[int, Outcome]) -> int:
    """The exit status of a sweep: 0 where all succeeded, 1 where one failed, 2 where one was
    refused, 130 where it was interrupted."""
    told = (outcome.status for outcome in outcomes.values())
    return max((s if s in (0, 2, 130) else 1 for s in told), default=0)
