"""Small trace files for tests, and what to ask of the traces that come of them."""

import json


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def ids(trace):
    return list(trace.requests())


def noted(trace, words):
    return any(words in sentence for sentence in trace.notes)
