"""Where the configuration lies: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from kvlab.core import BadInput

PACKAGE = Path(__file__).resolve().parents[1]


def conf_dir() -> Path:
    """The folder with kvlab's own `config.yaml`."""
    for candidate in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise BadInput("conf", PACKAGE, "no conf/config.yaml beside or inside the package; reinstall")


def add_config_dir(overrides: Sequence[str], folder: str | None) -> list[str]:
    """The overrides with a user's own config folder on the search path."""
    if folder is None:
        return list(overrides)
    if not Path(folder).is_dir():
        raise BadInput("--config-dir", folder, "no such folder")
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    key = "hydra.searchpath"
    given = [entry for o in parsed if o.key_or_group == key for entry in o.value()]
    entries = ",".join([f"'file://{Path(folder).resolve()}'", *(f"'{entry}'" for entry in given)])
    kept = [o.input_line for o in parsed if o.key_or_group != key]
    return [*kept, f"{key}=[{entries}]"]
