"""Whether W&B can be online at all, found out within seconds and without the library's own waits.

Left to itself, an online start without a network takes over 100 seconds to fail.
"""

from __future__ import annotations

import netrc
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from kvlab.core import BadInput

MODES = ("auto", "online", "offline", "disabled")
OLD_NAMES = {"dryrun": "offline", "run": "online"}


def choose_mode(asked: str, url: str, key: str | None, seconds: float = 3.0) -> tuple[str, str]:
    """The mode to start in, and the reason where that is not the one hoped for.

    `asked` is `track.mode`; WANDB_MODE speaks where it is `auto`. `key` is an API key that the
    settings hold, `url` the server. `auto` falls back to offline; `online` was asked for by name,
    so BadInput says why it cannot be had.
    """
    if asked == "auto" and os.environ.get("WANDB_MODE"):
        named = os.environ["WANDB_MODE"]
        asked = OLD_NAMES.get(named, named)
    if asked not in MODES:
        raise BadInput("track.mode", asked, f"known: {', '.join(MODES)}")
    if asked in ("offline", "disabled"):
        return asked, ""
    hindrance = no_key(url, key) or unreachable(url, seconds)
    if hindrance and asked == "online":
        raise BadInput("track.mode", asked, f"{hindrance}; mode=auto goes offline by itself")
    return ("offline", hindrance) if hindrance else ("online", "")


def no_key(url: str, key: str | None) -> str:
    """Why nobody is logged in, or nothing where somebody is."""
    if key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return ""
    files = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    if any(_logged_in(file, urlsplit(url).hostname) for file in files if file):
        return ""
    return "no API key (wandb login)"


def _logged_in(file: str | Path, host: str | None) -> bool:
    try:
        return netrc.netrc(os.path.expanduser(file)).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def unreachable(url: str, seconds: float) -> str:
    """Why the server does not answer; nothing where it does, or where a proxy hides it."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return ""
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname, port), timeout=seconds).close()
    except OSError as error:
        return f"{parts.hostname} cannot be reached ({error})"
    return ""
