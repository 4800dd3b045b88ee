"""What a failed call to Redis means for the outlet. None of it is the fault of a request."""

from __future__ import annotations

from typing import NamedTuple

from redis import exceptions


class Trouble(NamedTuple):
    """Why the store cannot be written to now.

    ``reconnect``: this connection leads to the wrong or a dead server, so the next try must resolve anew.
    """

    reason: str
    reconnect: bool


UNREACHABLE = Trouble("unreachable", reconnect=True)
MOVING = Trouble("moving", reconnect=True)
LOADING = Trouble("loading", reconnect=False)
FULL = Trouble("full", reconnect=False)
BUSY = Trouble("busy", reconnect=False)
DENIED = Trouble("denied", reconnect=True)
UNEXPECTED = Trouble("unexpected", reconnect=True)

_BY_CODE = {
    "OOM": FULL,
    "MISCONF": FULL,
    "NOREPLICAS": FULL,
    "LOADING": LOADING,
    "BUSY": BUSY,
    "UNKILLABLE": BUSY,
    "READONLY": MOVING,
    "TRYAGAIN": MOVING,
    "CLUSTERDOWN": MOVING,
    "MASTERDOWN": MOVING,
    "MOVED": MOVING,
    "ASK": MOVING,
    "NOPERM": DENIED,
    "NOAUTH": DENIED,
    "WRONGPASS": DENIED,
    "WRONGTYPE": DENIED,
}
_BY_CLASS: tuple[tuple[type[Exception], Trouble], ...] = (
    (exceptions.OutOfMemoryError, FULL),
    (exceptions.BusyLoadingError, LOADING),
    (exceptions.ReadOnlyError, MOVING),
    (exceptions.TryAgainError, MOVING),
    (exceptions.MasterDownError, MOVING),
    (exceptions.ClusterDownError, MOVING),
    (exceptions.ClusterError, MOVING),
    (exceptions.AskError, MOVING),
    (exceptions.NoPermissionError, DENIED),
    (exceptions.AuthenticationError, DENIED),
    (exceptions.SlotNotCoveredError, MOVING),
    (exceptions.RedisClusterException, UNREACHABLE),
    (exceptions.ConnectionError, UNREACHABLE),
    (exceptions.TimeoutError, UNREACHABLE),
    (OSError, UNREACHABLE),
)


def diagnose(error: Exception) -> Trouble:
    """Return what ``error`` means; an error of no known kind is ``unexpected``, and tried again too."""
    for kind, trouble in _BY_CLASS:
        if isinstance(error, kind):
            return trouble
    if isinstance(error, exceptions.ResponseError):
        text = str(error)
        # A script's inner error loses its code in some servers, and stands behind their own text in others.
        if "ACL failure" in text or "The user executing the script" in text:
            return DENIED
        for word in text.replace("-", " ").split():
            if word in _BY_CODE:
                return _BY_CODE[word]
    return UNEXPECTED
