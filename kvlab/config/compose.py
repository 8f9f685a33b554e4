"""Composition with Hydra, and its complaints turned into one sentence with a remedy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvlab.config import launchers, of_axes  # noqa: F401 -- they offer what `conf/` refers to
from kvlab.config.explain import tidy
from kvlab.config.overrides import parse
from kvlab.config.paths import conf_dir
from kvlab.config.signature import did_you_mean, show
from kvlab.config.tree import leaves, lookup, origin
from kvlab.core import BadInput, KvlabError


def compose(strings: Sequence[str], config_name: str = "config") -> DictConfig:
    """The composed configuration, `hydra` included; Hydra must be initialised.

    Raises `BadInput` for a key or an option that is not there.
    """
    overrides = parse(strings)
    try:
        return hydra.compose(config_name, list(strings), return_hydra_config=True)
    except MissingConfigException as error:
        raise _unknown_option(error) from error
    except (ConfigCompositionException, OmegaConfBaseException, ValueError) as error:
        _refuse_misnamed(overrides, error)
        _refuse_unknown_key(overrides, config_name)
        raise KvlabError(f"the configuration cannot be composed: {tidy(error)}") from error


def _unknown_option(error: MissingConfigException) -> KvlabError:
    """Hydra's message lists the options of every search path, each on a line with a tab."""
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return KvlabError(tidy(error))
    listing = str(error).partition("earch path:")[0].splitlines()
    known = [line.strip() for line in listing if line.startswith("\t")]
    return BadInput(group, option, f"no such option; {did_you_mean(option, known)}")


def _refuse_misnamed(overrides: list[Override], error: Exception) -> None:
    """Keys of Hydra itself, and keys inside a section given as a whole: `cache={blok_size: 3}`."""
    for override in overrides:
        whole = override.is_hydra_override() or isinstance(override.value(), dict)
        if whole and f"override '{override.key_or_group}'" in str(error):
            missing = str(error.__cause__).partition("\n")[0]
            raise BadInput(override.key_or_group, override.value(), f"no such key: {missing}")


def _refuse_unknown_key(overrides: list[Override], config_name: str) -> None:
    """Compose again with the group choices alone and find the first key that is not there."""
    loader = GlobalHydra.instance().config_loader()
    groups = [o for o in overrides if o.key_or_group in loader.list_groups("")]
    for override in groups:
        if not isinstance(override.value(), (str, list, dict)):
            known = loader.get_group_options(override.key_or_group)
            remedy = f"no such option; {did_you_mean('', known)}"
            raise BadInput(override.key_or_group, show(override.value()), remedy)
    plain = [o for o in overrides if o in groups or o.is_hydra_override()]
    config = hydra.compose(config_name, [o.input_line for o in plain], return_hydra_config=True)
    tree = OmegaConf.to_container(config, resolve=False)
    choices = tree.pop("hydra")["runtime"]["choices"]
    for override in (o for o in overrides if o not in plain and o.key_or_group not in choices):
        _refuse_key(override.key_or_group, show(override.value()), tree, choices)


def _refuse_key(key: str, value: object, tree: dict, choices: dict) -> None:
    known = [path for path, _ in leaves(tree, "") if path and "_target_" not in path]
    if key not in known:
        raise BadInput(key, value, f"no such key; {_near(key, known, tree, choices)}")
    if isinstance(lookup(tree, key), dict):
        inside = next((k for k in known if k.startswith(key + ".")), key)
        raise BadInput(key, value, f"is a section; set one of its keys, for example {inside}=...")


def _near(key: str, known: list[str], tree: dict, choices: dict) -> str:
    """What was meant: the key behind an alias, a near key of the section, another option."""
    if (meant := origin(tree, key)) in known:
        return f"set {meant} instead"
    group, _, rest = key.partition(".")
    having = next((option for option, keys in _shipped(group) if rest in keys), None)
    if having:
        return f"{group}={choices.get(group)} does not have it, {group}={having} does"
    section = key.rpartition(".")[0]
    return did_you_mean(key, [k for k in known if k.rpartition(".")[0] == section and k != "spec"])


@lru_cache(None)
def _shipped(group: str) -> list[tuple[str, set[str]]]:
    """Our options of a config group, each with the keys of its yaml."""
    files = sorted((conf_dir() / group).glob("*.yaml")) if group else []
    return [(file.stem, set(map(str, OmegaConf.load(file))) - {"defaults"}) for file in files]


def refuse_strays(tree: dict, choices: dict) -> None:
    """Sections that neither kvlab nor a config group knows, and keys of sections without a
    `_target_` that no shipped yaml has: typos in a user's yaml."""
    [own] = (keys for name, keys in _shipped(".") if name == "config")
    _refuse_stray("", tree, own.union(choices) - {"hydra"})
    for group, node in tree.items():
        if isinstance(node, dict) and "_target_" not in node and (files := _shipped(group)):
            _refuse_stray(f"{group}.", node, set().union(*(keys for _, keys in files)))


def _refuse_stray(at: str, node: dict, known: set[str]) -> None:
    for key in (k for k in node if k not in known):
        remedy = f"no such key; {did_you_mean(key, sorted(known))}"
        raise BadInput(f"{at}{key}", show(node[key]), remedy)
