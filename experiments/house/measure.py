"""`python experiments/house/measure.py [--root DIR] [--out FILE]`: the house measured, as rows.

--root: a checkout to measure (default: the one that this file lies in), so that an older commit can
be measured by today's script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOMS = ("cache", "sim", "blocks", "eval", "config")  # the goal counts these, and what they become
HEIRS = ("source", "bench")
DRIVERS = ("model", "eager", "static", "replay")
os.environ.setdefault("TRITON_INTERPRET", "1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=HERE.parents[1])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    root = given.root.resolve()
    sys.path[:0] = [str(root), str(HERE)]
    commit = _commit(root)
    rows = [
        {"variant": variant, "params": {"commit": commit, **params}, "name": name, "value": value,
         "unit": unit, "better": "lower", "low": None, "high": None, "count": None}
        for variant, params, name, value, unit in measures(root)
    ]  # fmt: skip
    for row in rows:
        told = ", ".join(f"{k}={v}" for k, v in row["params"].items() if k != "commit")
        print(f"{row['variant']:24} {row['name']:32} {row['value']:>10g} {row['unit']:10} {told}")
    if given.out:
        given.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


def measures(root: Path) -> Iterator[tuple[str, dict, str, float, str]]:
    """(variant, params, name, value, unit) of each measure."""
    yield from of_lines(root)
    yield from of_classes(root)
    yield from of_protocols(root)
    yield from of_axes(root)
    yield from of_tokens(root)


def of_lines(root: Path):
    import source_code as source

    found = source.lines(root)
    for name, (every, code) in sorted(found.items(), key=lambda item: -item[1][0]):
        yield f"room {name}", {}, "lines", every, "lines"
        yield f"room {name}", {}, "code_lines", code, "lines"
    rooms = [name for name in (*ROOMS, *HEIRS) if name in found]
    for at, name in enumerate(("lines", "code_lines")):
        total = sum(found[r][at] for r in rooms)
        yield "rooms of the goal", {"rooms": "+".join(rooms)}, name, total, "lines"
        yield "all rooms", {}, name, sum(pair[at] for pair in found.values()), "lines"


def of_classes(root: Path):
    import source_code as source

    every = source.classes(root)
    whole = source.inherited(root)
    own = sorted(every, key=lambda one: -len(one.methods))[:5]
    most = sorted(whole.items(), key=lambda item: -len(item[1][0]))[:5]
    for one in own:
        yield one.name, {"file": one.file}, "own_methods", len(one.methods), "methods"
        yield one.name, {"file": one.file}, "own_attributes", len(one.attributes), "attributes"
    for name, (methods, attributes) in most:
        yield name, {}, "methods_with_inherited", len(methods), "methods"
        yield name, {}, "attributes_with_inherited", len(attributes), "attributes"


def of_protocols(root: Path):
    import source_code as source

    found = source.protocols(root)
    told = {name: " ".join(sorted(files)) for name, files in found.items()}
    yield "request protocol", told, "copies", len(found), "rooms"


def of_axes(root: Path):
    import source_code as source

    found = source.axis_lists(root)
    kvlab = {file for file in found if not file.startswith("tests/")}
    for file, count in sorted(found.items()):
        yield file, {}, "axes_listed_by_hand", count, "axes"
    yield "add an axis", {}, "files_that_list_axes", len(kvlab), "files"
    yield "add an axis", {}, "tests_that_list_axes", len(found) - len(kvlab), "files"


def of_tokens(root: Path):
    import token_path

    for driver in DRIVERS:
        for name, value in token_path.measured(root, driver).items():
            params = {"driver": driver, "layers": token_path.LAYERS[0]}
            yield f"decoded token, {driver}", params, name, value, "calls" if "calls" in name \
                else name  # fmt: skip


def _commit(root: Path) -> str:
    out = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
                         capture_output=True, text=True, check=False)  # fmt: skip
    return out.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
