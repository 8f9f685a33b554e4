"""The command line: overrides, and Hydra's own options anywhere among them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from kvlab.config.overrides import with_list_of_tasks
from kvlab.core import BadInput

# Hydra's own options: switches, and those with a value, one of these or any.
_SWITCHES = ("-h --help", "--hydra-help", "--resolve", "-r --run", "-m --multirun",
             "-sc --shell-completion")  # fmt: skip
_VALUES = {
    "-c --cfg": ("job", "hydra", "all"), "-p --package": None, "-cp --config-path": None,
    "-cn --config-name": None, "-cd --config-dir": None,
    "-i --info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}  # fmt: skip


def given_options(args: Namespace) -> list[str]:
    """Hydra's options as they were given, in front: it takes overrides in one row only."""
    given = []
    for option in (*_SWITCHES, *_VALUES):
        long = option.split()[-1]
        value = getattr(args, long.lstrip("-").replace("-", "_"))
        if value:
            given.append(long if value is True else f"{long}={value}")
    return given


def parse_line(argv: list[str]) -> Namespace:
    """Options may stand anywhere among the overrides."""
    parser = ArgumentParser(prog="kvlab", add_help=False)
    parser.add_argument("overrides", nargs="*")
    for option in _SWITCHES:
        parser.add_argument(*option.split(), action="store_true")
    for option, choices in _VALUES.items():
        more = {"nargs": "?", "const": "all"} if option.endswith("info") else {}
        parser.add_argument(*option.split(), choices=choices, **more)

    def refuse(message: str):
        raise BadInput("command line", " ".join(argv), f"{message}; --help lists the options")

    parser.error = refuse
    args = parser.parse_intermixed_args(argv)
    args.overrides = with_list_of_tasks(args.overrides)
    return args
