"""`hydra/launcher=joblib`, `submitit`, `ray`: `conf/launcher/` offered where Hydra looks.

Not as files of that group: Hydra's own plugins offer the same names, with schemas of theirs.
Plugins are looked for first, so that ours stand last; other programs of the machine keep theirs.
"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from kvlab.config import plugins
from kvlab.config.paths import conf_dir


def offer() -> None:
    """Make the launchers known to Hydra."""
    for plugin in plugins.LAUNCHERS:
        Plugins.instance().register(plugin)
    for file in sorted((conf_dir() / "launcher").glob("*.yaml")):
        node = OmegaConf.load(file)
        ConfigStore.instance().store(file.stem, node, group="hydra/launcher", provider="kvlab")


offer()
