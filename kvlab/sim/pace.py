"""When prompts are computed and answers done: requests side by side, or in steps of one device."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush, heapreplace
from math import ceil, inf, sqrt
from typing import NamedTuple

from kvlab.sim.costs import CostModel


class Work(NamedTuple):
    """What a request asks of the device.

    new, behind: tokens of its prompt to compute, and those in front of them that were found.
    prompt, output: tokens of it. arrival: ms; began: when it got its blocks; copy_ms: of what comes
    from a tier, before anything is computed. of: the caller's own.
    """

    new: int
    behind: int
    prompt: int
    output: int
    arrival: float
    began: float
    copy_ms: float
    of: object


class Event(NamedTuple):
    """At `ms` the prompt of a request is computed, and with it the first token, or it is `done`.
    queued_ms: how long a computed prompt waited for its turn."""

    ms: float
    work: Work
    done: bool
    queued_ms: float = 0.0


def pace_of(cost: CostModel) -> Lanes | Steps:
    return Lanes(cost) if cost.chunk_tokens is None else Steps(cost)


class Lanes:
    """`prefills` prompts are computed at a time, each at full speed; a request decodes at the pace
    of the company it began in. Prefill and decode do not slow each other down."""

    now = 0.0

    def __init__(self, cost: CostModel):
        self.cost = cost
        self._free_at = [0.0] * (cost.prefills or 0)
        heapify(self._free_at)
        self._due: list[tuple[float, int, Event]] = []
        self._order = self._running = 0

    def enter(self, work: Work) -> None:
        """A request has its blocks, at `work.began`."""
        ready = begin = work.began + work.copy_ms
        self._running += 1
        takes = self.cost.prefill_ms(work.new, work.behind)
        if self._free_at:
            begin = max(ready, self._free_at[0])
            heapreplace(self._free_at, begin + takes)
        event = Event(begin + takes, work, False, begin - ready)
        answer_ms = self.cost.decode_ms(work.output, work.prompt, self._running)
        self._push(event, answer_ms)

    def _push(self, event: Event, answer_ms: float | None) -> None:
        self._order += 1
        heappush(self._due, (event.ms, self._order, event, answer_ms))

    def next(self, until: float | None) -> Event | None:
        """What happens next, if not later than `until` (None: whenever)."""
        if not self._due or (until is not None and self._due[0][0] > until):
            return None
        ms, _, event, answer_ms = heappop(self._due)
        if event.done:
            self._running -= 1
        else:
            self._push(Event(ms + answer_ms, event.work, True), None)
        return event


class Steps:
    """One device, step by step as engines with chunked prefill run it, and `serve.Loop`: a chunk of
    one prompt (of several, with `packed`), first come first served, then a token of every request
    whose prompt is computed. So a prompt holds up all answers, and the more answers, the slower a
    prompt.

    Requests enter between two steps. Answers alone are run many steps at once.
    """

    def __init__(self, cost: CostModel):
        self.cost, self.now = cost, 0.0
        self._step_ms, self._row_ms, self._token_ms = cost.step_costs
        self._prompts: deque[list] = deque()  # [work, tokens left, tokens there, ms of its turn]
        self._answers: list[tuple[int, int, Work]] = []  # heap by the step that is the last
        self._steps = self._order = 0
        self._context = 0  # tokens that the answers read at the next step
        self._events: deque[Event] = deque()

    def enter(self, work: Work) -> None:
        self._prompts.append([work, work.new, work.behind, None])

    def next(self, until: float | None) -> Event | None:
        limit = inf if until is None else until
        while not self._events:
            prompt = self._turn()
            if prompt is None and not self._answers:
                waits = min((self._ready(p) for p in self._prompts), default=inf)
                if waits == inf or waits > limit:
                    return None
                self.now = max(self.now, waits)
            elif self.now >= limit:
                return None
            elif prompt is not None:
                self._chunk()
                self._decode(1)
            else:
                copied = min((self._ready(p) for p in self._prompts), default=inf)
                self._decode(self._steps_before(min(limit, copied)))
        return self._events.popleft()

    @staticmethod
    def _ready(prompt: list) -> float:
        return prompt[0].began + prompt[0].copy_ms

    def _turn(self) -> list | None:
        """The first prompt whose blocks are there."""
        return next((p for p in self._prompts if self._ready(p) <= self.now), None)

    def _chunk(self) -> None:
        """Tokens of the first prompt, and whole ones behind it that fit in and may share it."""
        room, began, done = self.cost.chunk_tokens, self.now, []
        for prompt in [p for p in self._prompts if self._ready(p) <= began]:
            work, left, there, turn = prompt
            first = room == self.cost.chunk_tokens
            if not first and left > room:
                continue
            if turn is None:
                prompt[3] = began
            count = min(left, room)
            room -= count
            self.now += self.cost.prefill_ms(count, there, first)
            prompt[1], prompt[2] = left - count, there + count
            if not prompt[1]:
                done.append(prompt)
            if not (room and self.cost.packed):
                break
        for prompt in done:
            self._computed(prompt)

    def _computed(self, prompt: list) -> None:
        """All of a prompt is there, and its first token."""
        work, turn = prompt[0], prompt[3]
        self._prompts.remove(prompt)
        self._events.append(Event(self.now, work, False, turn - self._ready(prompt)))
        if work.output <= 1:  # the first token came with the prompt
            self._events.append(Event(self.now, work, True))
            return
        self._order += 1
        heappush(self._answers, (self._steps + work.output - 1, self._order, work))
        self._context += work.prompt

    def _decode(self, steps: int) -> None:
        rows = len(self._answers)
        if not rows:
            return
        self.now += self._takes(steps)
        self._steps += steps
        self._context += rows * steps
        while self._answers and self._answers[0][0] <= self._steps:
            _, _, work = heappop(self._answers)
            self._context -= work.prompt + work.output - 1
            self._events.append(Event(self.now, work, True))

    def _takes(self, steps: int) -> float:
        """ms of so many steps of the answers alone."""
        rows = len(self._answers)
        each = self._step_ms + self._row_ms * rows + self._token_ms * self._context
        return steps * each + self._token_ms * rows * steps * (steps - 1) / 2

    def _steps_before(self, ms: float) -> int:
        """Steps until an answer is done, or until the first step that ends at `ms` or later."""
        most = self._answers[0][0] - self._steps
        left, rows = ms - self.now, len(self._answers)
        if left == inf or self._takes(most) < left:
            return most
        half = self._token_ms * rows / 2
        each = self._step_ms + self._row_ms * rows + self._token_ms * self._context - half
        steps = left / each if not half else (sqrt(each * each + 4 * half * left) - each) / half / 2
        return min(most, max(1, ceil(steps - 1e-9)))
