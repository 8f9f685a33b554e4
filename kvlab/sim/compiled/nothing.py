"""No tier behind the device."""

from kvlab.sim.compiled.bind import verb


@verb
def holds(host, content):
    return False


@verb
def take(s, host, ids, begin, end):
    pass


@verb
def put(s, host, gone, left, count):
    pass
