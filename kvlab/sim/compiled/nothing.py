"""No tier behind the device."""

from kvlab.sim.compiled.bind import verb


@verb
def holds(host, content):
    return False


@verb
def take(host, ids, unique, block, at):
    pass


@verb
def put(s, host, gone, left, count):
    pass
