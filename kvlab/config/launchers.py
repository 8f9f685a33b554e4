"""`hydra/launcher=joblib`, `submitit`, `ray`: `conf/launcher/` offered where Hydra looks.

Not as files of that group: Hydra's own plugins offer the same names, with schemas of theirs.
Plugins are looked for first, so that ours stand last; other programs of the machine keep theirs.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from kvlab.config import plugins
from kvlab.config.paths import conf_dir


def offer() -> None:
    """Make the launchers known to Hydra."""
    _importable()
    for plugin in plugins.LAUNCHERS:
        Plugins.instance().register(plugin)
    for file in sorted((conf_dir() / "launcher").glob("*.yaml")):
        node = OmegaConf.load(file)
        ConfigStore.instance().store(file.stem, node, group="hydra/launcher", provider="kvlab")


def _importable() -> None:
    """Hydra makes a plugin of the dotted path of its class, and looks it up by import."""
    top = plugins.PACKAGE.partition(".")[0]
    if top not in sys.modules and find_spec(top) is None:  # no other program has plugins here
        sys.modules[top] = module_from_spec(ModuleSpec(top, None, is_package=True))
    sys.modules[plugins.PACKAGE] = plugins


offer()
