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
    """One device, step by step as `serve.Loop` and engines with chunked prefill run it: a chunk of
    one prompt (of several, with `packed`), first come first served, then a token of every request
    whose prompt is computed. So a prompt holds up all answers, and the more answers, the slower a
    prompt.

    Requests enter between two steps. A first token is there when its chunk is; with `lag`, at the
    end of the step that is so many later, and so is the end of an answer. Answers alone are run
    many steps at once.
    """

    def __init__(self, cost: CostModel):
        self.cost, self.now = cost, 0.0
        self._prompts: deque[list] = deque()  # [work, tokens left, tokens there, ms of its turn]
        self._rows = Rows(cost.step_costs)
        self._since_chunk = cost.decode_steps
        self._events: deque[Event] = deque()
        self._unseen: deque[tuple[int, Event]] = deque()  # with the step whose end shows them
        self._step = 0

    def enter(self, work: Work) -> None:
        self._prompts.append([work, work.new, work.behind, None])

    def next(self, until: float | None) -> Event | None:
        limit = inf if until is None else until
        while not self._events:
            prompt = self._turn()
            if prompt is None and not self._rows.count and not self._unseen:
                waits = min((self._ready(p) for p in self._prompts), default=inf)
                if waits == inf or waits > limit:
                    return None
                self.now = max(self.now, waits)
            elif self.now >= limit:
                return None
            elif prompt or self._unseen:
                self._one_step(prompt)  # without work it takes no time
            else:
                self._many_steps(limit)
        return self._events.popleft()

    @staticmethod
    def _ready(prompt: list) -> float:
        return prompt[0].began + prompt[0].copy_ms

    def _turn(self) -> list | None:
        """The first prompt whose blocks are there."""
        return next((p for p in self._prompts if self._ready(p) <= self.now), None)

    def _one_step(self, prompt: list | None) -> None:
        """As `serve.Loop._step`: a chunk if one is due, and a token of every answer."""
        between = self.cost.decode_steps
        chunk = prompt is not None and self._since_chunk >= between
        if chunk:
            self._chunk()
        if not chunk or between:
            self._decode(1)
        self._since_chunk = min(1, between) if chunk else self._since_chunk + 1
        self._show(self._step)
        self._step += 1

    def _many_steps(self, limit: float) -> None:
        """Answers alone, until one is done or something comes."""
        copied = min((self._ready(p) for p in self._prompts), default=inf)
        steps = self._rows.steps_before(min(limit, copied) - self.now)
        self._step += steps - 1
        self._decode(steps)
        self._since_chunk += steps
        self._show(self._step)
        self._step += 1

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
        self._happened(Event(self.now, work, False, turn - self._ready(prompt)))
        if work.output <= 1:  # the first token came with the prompt
            self._happened(Event(self.now, work, True))
        else:
            self._rows.join(work)

    def _decode(self, steps: int) -> None:
        if self._rows.count:
            self.now += self._rows.takes(steps)
            for work in self._rows.run(steps):
                self._happened(Event(self.now, work, True))

    def _happened(self, event: Event) -> None:
        if self.cost.lag:
            self._unseen.append((self._step + self.cost.lag, event))
        else:
            self._events.append(event)

    def _show(self, step: float) -> None:
        """What the host sees now, at the end of `step`."""
        while self._unseen and self._unseen[0][0] <= step:
            self._events.append(self._unseen.popleft()[1]._replace(ms=self.now))


class Rows:
    """Answers that are decoded together. costs: ms of a step, of each row, of each token that rows
    read, and of each token of the longest row, which the others wait for."""

    def __init__(self, costs: tuple[float, ...]):
        self._step_ms, self._row_ms, self._token_ms, self._longest_ms = costs
        self._answers: list[tuple[int, int, Work]] = []  # heap by the step that is the last
        self._longest: list[tuple[int, int]] = []  # heap of (-length at step 0, last step)
        self._steps = self._order = 0
        self._context = 0  # tokens that the answers read at the next step

    @property
    def count(self) -> int:
        return len(self._answers)

    def join(self, work: Work) -> None:
        """A request whose prompt and first token are there."""
        self._order += 1
        last = self._steps + work.output - 1
        heappush(self._answers, (last, self._order, work))
        heappush(self._longest, (self._steps - work.prompt, last))
        self._context += work.prompt

    def run(self, steps: int) -> list[Work]:
        """So many steps, no more than any answer needs; whose answers are done."""
        self._steps += steps
        self._context += self.count * steps
        done = []
        while self._answers and self._answers[0][0] <= self._steps:
            work = heappop(self._answers)[2]
            self._context -= work.prompt + work.output - 1
            done.append(work)
        while self._longest and self._longest[0][1] <= self._steps:
            heappop(self._longest)
        return done

    def takes(self, steps: int) -> float:
        """ms of so many steps. Each is longer than the one before: all rows have grown by one."""
        each, more = self._paces()
        return steps * each + more * steps * (steps - 1) / 2

    def _paces(self) -> tuple[float, float]:
        """ms of the next step, and by how much more each one after it takes."""
        rows, longest = self.count, self._steps - self._longest[0][0]
        each = self._step_ms + self._row_ms * rows + self._token_ms * self._context
        return each + self._longest_ms * longest, self._token_ms * rows + self._longest_ms

    def steps_before(self, left: float) -> int:
        """Steps until an answer is done, or until the first step that ends in `left` ms or more."""
        most = self._answers[0][0] - self._steps
        if left == inf or self.takes(most) < left:
            return most
        first, more = self._paces()
        half, each = more / 2, first - more / 2
        steps = left / each if not half else (sqrt(each * each + 4 * half * left) - each) / half / 2
        return min(most, max(1, ceil(steps - 1e-9)))
