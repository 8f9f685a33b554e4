"""Composition with Hydra, and its complaints turned into one sentence with a remedy."""

from __future__ import annotations

from collections.abc import Sequence

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvlab.config.overrides import parse
from kvlab.config.paths import conf_dir
from kvlab.config.signature import did_you_mean
from kvlab.config.tree import leaves
from kvlab.core import BadInput, KvlabError


def compose(strings: Sequence[str], config_name: str = "config") -> DictConfig:
    """The composed configuration, `hydra` included. Raises `BadInput`; Hydra must be initialised."""
    overrides = parse(strings)
    try:
        return hydra.compose(config_name, list(strings), return_hydra_config=True)
    except MissingConfigException as error:
        raise _unknown_option(error) from error
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        _refuse_unknown_key(overrides, config_name)
        raise KvlabError(f"the configuration cannot be composed: {_reason(error)}") from error


def groups() -> list[str]:
    """Names of the top-level config groups."""
    return [g for g in GlobalHydra.instance().config_loader().list_groups("") if g != "hydra"]


def _unknown_option(error: MissingConfigException) -> KvlabError:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return KvlabError(_reason(error))
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    return BadInput(group, option, f"no such option; {did_you_mean(option, known)}")


def _refuse_unknown_key(overrides: list[Override], config_name: str) -> None:
    """Compose again with the group choices alone and find the first key that is not there."""
    plain = [o for o in overrides if o.key_or_group in groups() or o.is_hydra_override()]
    config = hydra.compose(config_name, [o.input_line for o in plain], return_hydra_config=True)
    choices = config.hydra.runtime.choices
    known = [path for path, _ in leaves(OmegaConf.to_container(config, resolve=False), "") if path]
    for override in (o for o in overrides if o not in plain and o.key_or_group not in choices):
        key = override.key_or_group
        if key not in known:
            raise BadInput(key, override.value(), f"no such key; {_near(key, known)}")
        if isinstance(OmegaConf.select(config, key, throw_on_missing=False), DictConfig):
            remedy = f"is a section; set one of its keys, for example {_first_inside(key, known)}"
            raise BadInput(key, override.value(), remedy)


def _near(key: str, known: list[str]) -> str:
    """Suggestions from the same section first; a full list of all keys would be no help."""
    section = key.rpartition(".")[0]
    inside = [k for k in known if k.rpartition(".")[0] == section and "_target_" not in k]
    return did_you_mean(key, inside or [k for k in known if "." not in k])


def _first_inside(key: str, known: list[str]) -> str:
    inside = (k for k in known if k.startswith(key + ".") and "_target_" not in k)
    return next(inside, key) + "=..."


def refuse_strays(tree: dict, choices: dict) -> None:
    """A top-level section that neither kvlab nor a config group knows: a typo in a yaml."""
    shipped = OmegaConf.load(conf_dir() / "config.yaml")
    known = {*map(str, shipped), *choices} - {"defaults", "hydra"}
    for key in tree.keys() - known:
        raise BadInput(key, tree[key], f"no such key; {did_you_mean(key, sorted(known))}")
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
            raise BadInput(f"{group}.{key}", node[key], remedy)


def _reason(error: BaseException) -> str:
    texts = [str(error), str(error.__cause__ or "")]
    return " ".join(" ".join(texts).split())
