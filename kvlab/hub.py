"""Can the Hugging Face hub be reached? Asked before libraries that retry for a minute. And the
user's folder for what is made once and may be deleted at any time."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

PATIENCE_SECONDS = 3.0


def obstacle(patience_seconds: float = PATIENCE_SECONDS) -> str | None:
    """Why the hub cannot be reached, in a few words; None where it answers.

    Answers within `patience_seconds` plus a moment, also where a name lookup hangs: the question
    is put in a thread that is left behind. Proxies of the environment are honoured.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE is set"
    answer = [f"no answer within {patience_seconds:g} s"]
    asking = threading.Thread(target=_ask, args=(answer, patience_seconds), daemon=True)
    asking.start()
    asking.join(patience_seconds)
    return answer[-1]


def cache_folder() -> Path:
    """The user's cache folder of kvlab: KVLAB_CACHE, else a place under the system's."""
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KVLAB_CACHE") or Path(shared) / "kvlab")


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _ask(answer: list[str | None], timeout: float) -> None:
    try:
        request = urllib.request.Request(endpoint(), method="HEAD")
        urllib.request.urlopen(request, timeout=timeout).close()
        answer.append(None)
    except urllib.error.HTTPError as error:  # a refusal is an answer, unless a proxy gave it
        answer.append(f"HTTP status {error.code}" if error.code in (407, 502, 503, 504) else None)
    except (OSError, ValueError) as error:
        answer.append(str(getattr(error, "reason", error)))
