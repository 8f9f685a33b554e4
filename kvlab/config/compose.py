"""Composition with Hydra, and its complaints turned into one sentence with a remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

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


def _groups() -> list[str]:
    """Names of the config groups that lie beside `config.yaml`."""
    return GlobalHydra.instance().config_loader().list_groups("")


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
    found = re.match("Could not override '(.+?)'", str(error))
    override = next((o for o in overrides if found and o.key_or_group == found[1]), None)
    if override is None or not (override.is_hydra_override() or isinstance(override.value(), dict)):
        return
    missing = str(error.__cause__).partition("\n")[0]
    raise BadInput(override.key_or_group, override.value(), f"no such key: {missing}") from error


def _refuse_unknown_key(overrides: list[Override], config_name: str) -> None:
    """Compose again with the group choices alone and find the first key that is not there."""
    plain = [o for o in overrides if o.key_or_group in _groups() or o.is_hydra_override()]
    _refuse_scalar_choice([o for o in plain if not o.is_hydra_override()])
    config = hydra.compose(config_name, [o.input_line for o in plain], return_hydra_config=True)
    tree = OmegaConf.to_container(config, resolve=False)
    choices = tree.pop("hydra")["runtime"]["choices"]
    for override in (o for o in overrides if o not in plain and o.key_or_group not in choices):
        _refuse_key(override, tree, choices)


def _refuse_scalar_choice(group_overrides: list[Override]) -> None:
    for override in group_overrides:
        group, value = override.key_or_group, override.value()
        if not isinstance(value, (str, list, dict)):
            known = GlobalHydra.instance().config_loader().get_group_options(group)
            raise BadInput(group, show(value), f"no such option; {did_you_mean('', known)}")


def _refuse_key(override: Override, tree: dict, choices: dict) -> None:
    key, value = override.key_or_group, show(override.value())
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
    section, group = key.rpartition(".")[0], key.partition(".")[0]
    inside = [k for k in known if k.rpartition(".")[0] == section and k != "spec"]
    having = _options_with(key)
    if having:
        return f"{group}={choices.get(group)} does not have it, {group}={having[0]} does"
    return did_you_mean(key, inside)


def _options_with(key: str) -> list[str]:
    """The options of a group whose yaml has `key`, for `data.path` those with a path."""
    group, _, rest = key.partition(".")
    files = sorted((conf_dir() / group).glob("*.yaml")) if rest else []
    return [file.stem for file in files if rest in OmegaConf.load(file).keys()]  # noqa: SIM118 -- `in` skips ???


def refuse_strays(tree: dict, choices: dict) -> None:
    """A top-level section that neither kvlab nor a config group knows: a typo in a yaml."""
    shipped = OmegaConf.load(conf_dir() / "config.yaml")
    known = {*map(str, shipped), *choices} - {"defaults", "hydra"}
    for key in tree.keys() - known:
        raise BadInput(key, show(tree[key]), f"no such key; {did_you_mean(key, sorted(known))}")
    for key in known & tree.keys():
        _refuse_stray_inside(key, tree[key])


def _refuse_stray_inside(group: str, node: object) -> None:
    """Sections without a `_target_` have no signature: the shipped yamls say what they hold."""
    files = sorted((conf_dir() / group).glob("*.yaml"))
    if not isinstance(node, dict) or "_target_" in node or not files:
        return
    known = sorted({str(key) for file in files for key in OmegaConf.load(file)})
    for key in node:
        if key not in known:
            remedy = f"no such key; {did_you_mean(key, known)}"
            raise BadInput(f"{group}.{key}", show(node[key]), remedy)
