"""How long a process waits at its start for what is not there yet, in whatever order things are started."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from inferfleet.errors import InferfleetError

log = structlog.get_logger(__name__)

T = TypeVar("T")

SERVER_S = 60.0
"""How long a server that does not answer is waited for where nobody said anything else."""
_LEAST_S = 1.0
_AGAIN_S = 0.5


class Patience:
    """One start's waiting. With ``wait_s`` all of it together is bounded by that many seconds.

    Without it (``None``) each server has :data:`SERVER_S` to answer, and all else has to be there.
    """

    def __init__(self, wait_s: float | None = None) -> None:
        self._wait_s = wait_s
        self._ends_at = time.monotonic() + (wait_s or 0.0)

    @property
    def given(self) -> bool:
        """Whether somebody asked for waiting."""
        return self._wait_s is not None

    @property
    def server_s(self) -> float:
        """How long the next server may take to answer, in seconds.

        One that is there is heard in the last second too, so ``--wait 0`` starts where nothing is missing.
        """
        return SERVER_S if self._wait_s is None else max(_LEAST_S, self._ends_at - time.monotonic())

    def until(self, event: str, look: Callable[[], T]) -> T:
        """Return what ``look`` returns, asking it again while it raises and there is time left.

        Each new reason is logged once, as ``event``. Raises ``look``'s last
        :class:`~inferfleet.errors.InferfleetError` when the time is over, without ``--wait`` the first.
        """
        told = ""
        while True:
            try:
                return look()
            except InferfleetError as error:
                left_s = self._ends_at - time.monotonic()
                if not self.given or left_s <= 0:
                    raise
                if str(error) != told:
                    told = str(error)
                    log.warning(event, error=told, seconds_left=round(left_s))
            time.sleep(min(_AGAIN_S, left_s))
