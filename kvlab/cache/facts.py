"""What a cache must know of the model that fills it, to share what it has computed."""

from __future__ import annotations


class ModelFacts:
    """A model that never changes, as far as the cache can tell: the null member.

    identity: changes with all that makes the keys of a prompt, as last read.
    parameters: how many drive a prefill's FLOPs.
    """

    def __init__(self, identity: str = "", parameters: float = 0.0):
        self.identity, self.parameters = identity, parameters

    def read(self, here: bool = True) -> str:
        """The identity of now, read in full. here: under the circumstances of the caller; False
        where he ends what a forward has begun."""
        return self.identity

    def moved(self) -> bool:
        """Whether a quick look finds another model than `read` did."""
        return False

    def check(self, module) -> None:
        """Raises `KvlabError` where `module`, about to fill the cache, is of another model."""


NO_FACTS = ModelFacts()
