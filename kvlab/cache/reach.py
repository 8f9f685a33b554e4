"""A whole is composed of parts; people, who have one object in their hands, reach them by it."""

from __future__ import annotations

_NOTHING = object()


class Reach:
    """A cache whose `parts` are named, the nearest first: what it has not itself, they may have.

    Who knows the part asks it directly.
    """

    parts: tuple[str, ...] = ()

    def __getattr__(self, name: str):
        if name in self.parts or name.startswith("__"):  # a copy asks before it has any
            raise AttributeError(name)
        found = (getattr(getattr(self, part), name, _NOTHING) for part in self.parts)
        value = next((x for x in found if x is not _NOTHING), _NOTHING)
        if value is _NOTHING:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return value
