"""Any complaint of Hydra, OmegaConf or kvlab as one paragraph for the user."""

from __future__ import annotations

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from kvlab.core import KvlabError


def chain(error: BaseException | None):
    """The error and what caused it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def complaint(error: BaseException) -> KvlabError | None:
    """kvlab's own error inside `error`: Hydra wraps what a constructor raises."""
    return next((cause for cause in chain(error) if isinstance(cause, KvlabError)), None)


def explain(error: BaseException) -> str | None:
    """One paragraph where `error` is the user's to mend; None where it is a defect of kvlab."""
    if own := complaint(error):
        return " ".join(str(own).split())
    return tidy(error) if isinstance(error, (HydraException, OmegaConfBaseException)) else None


def tidy(error: BaseException) -> str:
    """The texts of an error and its causes in one line."""
    return "; ".join(dict.fromkeys(" ".join(str(e).split()) for e in chain(error) if str(e)))
