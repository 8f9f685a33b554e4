"""What work takes: seconds of prefill, decode and copies, money and joules.

Round numbers by default, or those that `job=calibrate` measured on a machine, a plain JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kvlab.core import BadInput, check_number
from kvlab.kinds import members


@dataclass(frozen=True)
class Calibration:
    """Coefficients that `job=calibrate` fitted to its measurements; `about` says of what.

    prefill: ms of a chunk that is a prompt of n tokens, prefill[0] + prefill[1] n + prefill[2] n^2;
        a fourth number is of each further prompt in a chunk (0 where it is not there).
    decode: ms of a step of r rows over c tokens in all, decode[0] + decode[1] r + decode[2] c; a
        fourth number is of each token of the longest row (0 where it is not there).
    to_host, to_device: of a copy of b bytes, ms = [0] + [1] b. token_bytes: of one cached token.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    to_host: tuple[float, float]
    to_device: tuple[float, float]
    token_bytes: float
    about: dict

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """Of a file, or of a folder with a `calibration.json`; BadInput where it is none."""
        file = Path(path) / "calibration.json" if Path(path).is_dir() else Path(path)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            made = cls(**found)
            numbers = [*made.prefill, *made.decode, *made.to_host, *made.to_device]
            right = [len(made.prefill), len(made.decode), len(made.to_host), len(made.to_device)]
            sound = {*right[:2]} <= {3, 4} and right[2:] == [2, 2] and min(map(float, numbers)) >= 0
        except (OSError, ValueError, TypeError) as error:
            remedy = f"is no file that job=calibrate wrote ({type(error).__name__})"
            raise BadInput("service.calibration", path, remedy) from None
        if not sound or not sum(made.prefill) > 0:
            raise BadInput("service.calibration", path, "holds numbers that no machine has")
        return made

    def write(self, path: str | Path) -> None:
        text = json.dumps(asdict(self), indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")


class NoService:
    """A request is over before the next one comes: hits are counted, times are not."""


@members("service")
@dataclass(frozen=True)
class CostModel:
    """How long a request holds its blocks: prompt tokens that did not hit are computed, then output
    tokens are made one by one.

    The rates are round numbers of an 8B model on one H100-class device; take measured ones from a
    run with `measured`, or name a file of `job=calibrate`.
    calibration: such a file, whose times stand in for both rates: prefill then depends on the
    length and on what stands before it, a step of decode on how many run and how much they read.
    prefills: prompts computed at a time; more wait in a queue (null: none waits).
    running: requests at a time (null: as many as there is room for).
    chunk_tokens: one device computes a chunk of so many tokens of one prompt, then a token of each
    answer, and so on, as `serve.Loop`: prompts and answers slow each other down. null: they do not,
    as where one machine computes prompts and another one answers.
    packed: a chunk takes whole prompts behind the first one as long as there is room in it.
    decode_steps: of answers between two chunks, as in `serve.Limits`; 0: none while a prompt waits.
    lag: steps that the host is behind the device, as in `serve.engine`: so much later it sees
    tokens, and lets the next request in (1 where the loop's steps are captured, or packed).
    dollars_per_hour, watts: of the device, for money and joules a million tokens (null: not told).
    """

    prefill_tokens_per_second: float = 20_000.0
    decode_tokens_per_second: float = 50.0
    calibration: str | None = None
    prefills: int | None = None
    running: int | None = None
    chunk_tokens: int | None = 512
    packed: bool = False
    decode_steps: int = 1
    lag: int = 0
    dollars_per_hour: float | None = None
    watts: float | None = None

    def __post_init__(self):
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            if not getattr(self, name) > 0:
                raise BadInput(f"service.{name}", getattr(self, name), "must be more than 0")
        least = {"prefills": 1, "running": 1, "chunk_tokens": 1, "dollars_per_hour": 0, "watts": 0}
        for name, at_least in least.items():
            value = getattr(self, name)
            if value is not None and not value >= at_least:
                raise BadInput(f"service.{name}", value, f"must be at least {at_least}, or null")
        check_number("service.decode_steps", self.decode_steps, 0)
        check_number("service.lag", self.lag, 0)
        if self.chunk_tokens is not None and self.prefills not in (None, 1):
            remedy = ("with service.chunk_tokens one prompt is computed at a time; leave one of "
                      "them null")
            raise BadInput("service.prefills", self.prefills, remedy)
        if self.packed and self.chunk_tokens is None:
            raise BadInput("service.packed", True, "packs chunks; give service.chunk_tokens")
        if self.calibration is not None:
            self.measures  # noqa: B018 -- a file that is none is refused now

    @cached_property
    def measures(self) -> Calibration | None:
        return None if self.calibration is None else Calibration.read(self.calibration)

    @classmethod
    def measured(cls, run: str | Path) -> CostModel:
        """The mean rates that a run folder (or its measurements.jsonl) holds."""
        path = Path(run)
        path = path / "measurements.jsonl" if path.is_dir() else path
        names = ("prefill_tokens_per_second", "decode_tokens_per_second")
        found: dict[str, list[float]] = {name: [] for name in names}
        for row in map(json.loads, path.read_text().splitlines()):
            if row["name"] in found:
                found[row["name"]].append(row["value"])
        missing = [name for name in names if not found[name]]
        if missing:
            raise BadInput("service", path, f"the run has no measurement {' or '.join(missing)}")
        return cls(*(float(np.mean(found[name])) for name in names))

    def prefill_ms(self, tokens: int, behind: int = 0, first: bool = True) -> float:
        """Of `tokens` computed on top of `behind` tokens that are there. first: of their chunk."""
        if self.measures is None:
            return 1e3 * tokens / self.prefill_tokens_per_second
        fixed, each, pair, further = _four(self.measures.prefill)
        own = fixed if first else further
        return own + each * tokens + pair * ((behind + tokens) ** 2 - behind**2)

    @property
    def step_costs(self) -> tuple[float, float, float, float]:
        """ms of a step of decode, of each request in it, of each token that it reads, and of each
        token of the longest one."""
        if self.measures is None:
            return 1e3 / self.decode_tokens_per_second, 0.0, 0.0, 0.0
        return _four(self.measures.decode)

    def decode_ms(self, tokens: int, context: int = 0, running: int = 1) -> float:
        """Of `tokens` output tokens over `context` ones, while `running` requests of that length
        take part in each step."""
        if self.measures is None:
            return 1e3 * tokens / self.decode_tokens_per_second
        step, row, read, longest = _four(self.measures.decode)
        each = step + row * running + (read * running + longest) * (context + tokens / 2)
        return tokens * each


def _four(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    """A file without the fourth number has none of its times."""
    return (*numbers, 0.0)[:4]
