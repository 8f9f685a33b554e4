"""WEKA kv-cache-tester: real agent sessions, a JSON file each; a folder of them is one trace.

`hash_ids` name whole blocks only (64 tokens), and only within their file. A `subagent` entry holds
requests of its own. Times are seconds from the start of the session. Nothing says when sessions
begin against each other: here all begin at 0.
https://github.com/callanjfox/kv-cache-tester
"""

from __future__ import annotations

from collections.abc import Iterator
from math import nan
from pathlib import Path

import numpy as np

from kvlab.core import BadInput
from kvlab.sim.readers.base import Numbers, Reader, Row, check_lengths, in_order
from kvlab.sim.readers.lines import lines, parse, whole_json

_REQUEST = ("t", "model", "in", "out", "hash_ids")


class Weka(Reader):
    name = "weka"
    needs = ("block_size", "hash_id_scope", "requests")
    kinds = ("folder", "json")
    default_block = 64
    whole_blocks = True

    def said_block_size(self) -> int | None:
        _, session = next(self._sessions(), (None, None))
        return session and session["block_size"]

    def rows(self) -> Iterator[tuple[str, Row]]:
        self.note("all sessions begin at 0: the files do not say when they began")
        return iter(in_order(self._rows()))

    def _rows(self) -> Iterator[tuple[str, Row]]:
        base, number, shared, scopes = 0, 0, 0, Numbers()
        for where, session in self._sessions():
            if session["block_size"] != self.block_size:
                remedy = f"blocks of {session['block_size']}, earlier ones of {self.block_size}"
                raise BadInput("trace.path", where, remedy)
            self._check_scope(where, session)
            found = list(self._requests(where, session, 0.0, number))
            models = sorted({request["model"] for _, _, request, *_ in found})
            highest, seen, root = -1, {}, number
            for place, at, request, *more in found:
                ids = self._ids(place, request)
                model = models.index(request["model"])
                seen.setdefault(model, []).append(ids)
                named = base + len(models) * ids + model
                yield place, self._row(at, request, named, *more, scopes[request["model"]], root)
                highest = max(highest, int(ids.max(initial=-1)))
                number = max(number, more[0] + 1)
            shared += _asked_by_several(seen)
            base += len(models) * (highest + 1)
        if shared:
            self.note(f"{shared} ids are asked for by two models of a session; they are kept apart")

    def _row(self, at: float, request: dict, ids, conversation: int, head: int, *places) -> Row:
        think = request.get("think_time")
        pause = nan if think is None else 1e3 * think
        small = ids.astype(np.int32) if ids.max(initial=0) < 1 << 31 else ids
        tool = int(request["stop"] == "tool_use") if "stop" in request else -1
        more = {"tool": tool, "shared_tokens": head, **dict(zip(("scope", "root"), places))}
        return Row(1e3 * at, request["in"], request["out"], small, conversation, pause, **more)

    def _ids(self, where: str, request: dict) -> np.ndarray:
        try:
            ids = np.array(request["hash_ids"])
        except ValueError:  # lists of several lengths
            ids = np.array(None)
        whole = ids.ndim == 1 and (ids.dtype == np.int64 or not len(ids))
        if not whole or ids.min(initial=0) < 0:
            raise BadInput("trace.path", where, "hash_ids must be whole numbers of at least 0")
        return ids.astype(np.int64)

    def _check_scope(self, where: str, session: dict) -> None:
        if session["hash_id_scope"] != "local":
            remedy = f"hash_id_scope {session['hash_id_scope']!r} is not known; only local is"
            raise BadInput("trace.path", where, remedy)

    def _requests(self, where: str, session: dict, start: float, conversation: int):
        """(place, seconds, request, number of its conversation, tokens of tools and system prompt);
        a sub-agent is a conversation of its own."""
        following, head = conversation + 1, self._head(where, session)
        for at, entry in enumerate(session["requests"]):
            place = f"{where}, request {at}"
            if entry.get("type") == "subagent":
                inner = entry["requests"]
                begin = self._begin(entry, inner)
                yield from self._requests(place, entry, start + begin, following)
                following += 1
                continue
            missing = [name for name in _REQUEST if name not in entry]
            if missing:
                raise BadInput("trace.path", place, f"missing {', '.join(missing)}")
            if type(entry["t"]) not in (int, float) or entry["t"] + start < 0:
                remedy = f"t must be seconds of at least 0, not {entry['t']!r}"
                raise BadInput("trace.path", place, remedy)
            yield place, start + entry["t"], entry, conversation, head

    def _head(self, where: str, session: dict) -> int:
        """Tokens of tools and system prompt, -1 where the file does not say."""
        parts = [session.get(name) for name in ("tool_tokens", "system_tokens")]
        if None in parts:
            return -1
        check_lengths(where, tool_tokens=parts[0], system_tokens=parts[1])
        return sum(parts)

    def _begin(self, entry: dict, inner: list) -> float:
        """What a sub-agent's times count from: its own start, or its session's where they are not
        below it."""
        own = any(request["t"] < entry["t"] for request in inner)
        if own:
            self.note("times of sub-agents count from the start of the sub-agent")
        return entry["t"] if own else 0.0

    def _sessions(self) -> Iterator[tuple[str, dict]]:
        for path in session_files(self.path):
            for where, session in _objects(path):
                self.check_fields(where, session)
                yield where, session


def _asked_by_several(seen: dict[int, list[np.ndarray]]) -> int:
    """How many ids more than one model asks for; seen: model -> ids of its requests."""
    if len(seen) < 2:
        return 0
    each = np.concatenate([np.unique(np.concatenate(ids)) for ids in seen.values()])
    return int(np.count_nonzero(np.unique(each, return_counts=True)[1] > 1))


def session_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.name.endswith((".json", ".json.gz")))


def _objects(path: Path) -> Iterator[tuple[str, dict]]:
    """One session a file, or one a line."""
    if ".jsonl" in path.name:
        yield from ((where, parse(where, line)) for where, line in lines(path))
        return
    session = whole_json(path)
    if not isinstance(session, dict):
        raise BadInput("trace.path", path, "expected one session, a JSON object")
    yield str(path), session
