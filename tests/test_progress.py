"""Progress of a run: time left by what each kind of work was measured to cost, in one bar."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress

from kvlab import progress
from kvlab.progress import Work, clock_time, firsts, paced, total


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def work(clock):
    return Work(clock)


def took(work, clock, seconds: float, part: str, who: str, kind: str, amount: float) -> None:
    clock.now += seconds
    work.spend(part, who, kind)
    work.done(part, who, {kind: amount})


def test_a_decoded_token_is_weighed_by_its_own_cost(work, clock):
    for who in ("bf16", "int4"):
        work.plan("text", who, {"read": 2000, "decode": 20})
    took(work, clock, 1.0, "text", "bf16", "read", 1000)
    assert work.left() == (3.0, False) and "at least 0:03 left" in work.told()
    took(work, clock, 4.0, "text", "bf16", "decode", 10)
    assert work.left() == (1.0 + 4.0 + 2.0 + 8.0, True)  # int4 goes by bf16 until it is measured
    took(work, clock, 3.0, "text", "int4", "read", 1000)
    assert work.left() == (1.0 + 4.0 + 3.0 + 8.0, True)
    clock.now += 1
    assert work.told() == "38 %, 0:09 so far, 0:15 left"


def test_who_failed_is_waited_for_no_more(work, clock):
    work.plan("text", "bf16", {"read": 10})
    work.plan("text", "int4", {"read": 10})
    took(work, clock, 1.0, "text", "bf16", "read", 5)
    work.drop("int4")
    assert work.left() == (1.0, True)


def test_a_part_that_nobody_measured_goes_by_another(work, clock):
    work.plan("4,096 tokens", "bf16", {"read": 100})
    work.plan("8,192 tokens", "bf16", {"read": 200})
    took(work, clock, 2.0, "4,096 tokens", "bf16", "read", 100)
    assert work.left() == (4.0, True)


def test_what_was_timed_as_one_is_divided_as_it_was_estimated(work, clock):
    work.plan("text", "bf16", {"read": 1000, "decode": 10})
    took(work, clock, 1.0, "text", "bf16", "read", 1000)
    took(work, clock, 3.0, "text", "bf16", "decode", 10)
    for who in ("bf16", "int4"):
        work.plan("cost", who, {"read": 1000, "decode": 10})
    assert work.left() == (8.0, True)           # by what the same, or any, cost in another part
    clock.now += 2.0
    work.spread("cost", "bf16", {"read": 1000, "decode": 10})
    assert work.left() == (2.0, True)
    work.plan("cost", "fp8", {"decode": 10})
    assert work.left() == (3.5, True)


def test_nothing_measured_is_said(work):
    work.plan("text", "bf16", {"read": 100})
    assert work.told() == "0:00 so far, time left not known yet"


def test_what_is_compiled_for_a_policy_tells_nothing_of_its_later_steps(work, clock):
    """`30:08 left` stood over a run of three minutes: each policy's first step compiles."""
    plan = ("lru", "fifo", "lru", "lru")
    kinds = firsts(plan)
    assert kinds == ["first", "first", "step", "step"]
    for who, kind in zip(plan, kinds):
        work.plan("trace", who, {kind: 10.0})
    took(work, clock, 12.0, "trace", "lru", "first", 10.0)
    assert work.left() == (12.0, False)  # fifo's first; of later steps nothing is known
    took(work, clock, 8.0, "trace", "fifo", "first", 10.0)
    took(work, clock, 0.5, "trace", "lru", "step", 10.0)
    assert work.left() == (0.5, True)


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    steps = paced("hit_rate", "ab", [("conversation", "lru", 10), ("conversation", "arc", 10)])
    assert list(steps) == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("(")[2] for line in lines] == ["conversation, lru)",
                                                           "conversation, arc)"]
    assert lines[0].startswith("hit_rate: ") and "100 %" in lines[1]


def test_a_short_run_logs_nothing(capsys):
    list(paced("hit_rate", "a", [("conversation", "lru", 10)]))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_one_bar_for_all_parts(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with total(True, "run") as outer, total(True, "part") as inner:
        assert inner is outer
        inner.work.plan("text", "bf16", {"read": 1})
        inner.work.spend("text", "bf16", "read")
        inner.work.done("text", "bf16", {"read": 1})
        inner.show()
    assert "so far" in capsys.readouterr().err


def test_times():
    assert [clock_time(s) for s in (0, 65, 3725)] == ["0:00", "1:05", "1:02:05"]


@pytest.mark.parametrize("width", [80, 200])
def test_the_bar_is_one_line(width):
    told = SimpleNamespace(told=lambda: "32 %, 1:00:21 so far, at least 1:00:45 left")
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as shown:
        bar = Progress(*progress._columns(told), console=console, expand=True)
        bar.add_task("text_loss 16,384 tokens, window.sinks=4 window.recent=4092", total=1.0)
        console.print(bar.get_renderable())
    [line] = shown.get().splitlines()
    assert "at least 1:00:45 left" in line and "text_loss 16,384" in line
