"""Where the configuration lies: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
    key = "hydra.searchpath="
    given = [text.removeprefix(key).strip("[]") for text in overrides if text.startswith(key)]
    entries = ",".join([f"'file://{Path(folder).resolve()}'", *given])
    return [*(text for text in overrides if not text.startswith(key)), f"{key}[{entries}]"]
