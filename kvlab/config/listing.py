"""`python -m kvlab list [GROUP ...]`: what there is to choose from, a line each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from kvlab import axes
from kvlab.config.paths import conf_dir
from kvlab.core import BadInput

FIRST = ("experiment", "job", "task", "model", "data", *axes.AXES)  # then what else there is


def listing(groups: Sequence[str] = (), width: int = 100) -> str:
    """Groups of the configuration and their options, each with what its yaml or the table of axes
    says of it, in lines of `width` columns. Raises `BadInput` for an unknown group."""
    there = {folder.name: folder for folder in sorted(conf_dir().iterdir()) if folder.is_dir()}
    for group in groups:
        if group not in there:
            raise BadInput("list", group, f"no such group; known: {', '.join(there)}")
    order = dict.fromkeys([*(name for name in FIRST if name in there), *there])
    return "\n\n".join(_group(there[name], width) for name in groups or order)


def _group(folder: Path, width: int) -> str:
    files = sorted(folder.glob("*.yaml"))
    room = max(len(file.stem) for file in files)
    left = max(20, width - room - 4)
    lines = [f"  {file.stem:{room}}  {shorten(_told(file), left, placeholder=' ...')}"
             for file in files]  # fmt: skip
    name = "hydra/launcher" if folder.name == "launcher" else folder.name
    return "\n".join([f"{name}=", *(line.rstrip() for line in lines)])


def _told(file: Path) -> str:
    axis = axes.TABLE.get(file.parent.name)
    if axis is not None and file.stem in axis.members:
        null = " (the default: changes nothing)" if file.stem == axis.null else ""
        return axis.members[file.stem].told + null
    lines = file.read_text(encoding="utf-8").splitlines()
    lines = lines[1:] if lines and lines[0].startswith("# @package") else lines
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).partition(". ")[0].rstrip(".")
