"""No eviction: a request for which there is no room is refused."""

EVICTS = False
