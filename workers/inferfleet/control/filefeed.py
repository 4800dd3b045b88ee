"""Routes from a file, as a log: read anew now and then, and without a history."""

from __future__ import annotations

from collections.abc import Callable

from inferfleet.errors import InferfleetError
from inferfleet.ports import Clock
from inferfleet.revisions import RouteLog, log_of_table
from inferfleet.routes import RouteTable

READ_EVERY_S = 5.0


class FileFeed:
    """A :class:`~inferfleet.control_ports.RouteFeed` over ``read``, which reads and checks a routes file.

    Each content is a log of its own: one revision for each route, in force at any time.
    """

    def __init__(self, read: Callable[[], RouteTable], clock: Clock) -> None:
        self._read = read
        self._clock = clock
        self._log: RouteLog | None = None
        self._read_at = 0.0
        self._wrong = ""

    def log(self) -> RouteLog:
        """Return the routes as they stood when the file was last read, at most ``READ_EVERY_S`` ago.

        Raises ConfigError once for each reading of a file that is wrong; until the next reading the one
        before stands.
        """
        now = self._clock.monotonic()
        if self._log is not None and now - self._read_at < READ_EVERY_S:
            return self._log
        self._read_at = now
        try:
            table = self._read()
        except InferfleetError as error:
            self._wrong = str(error)
            raise
        self._wrong = ""
        if self._log is None or table.revision != self._log.label:
            self._log = log_of_table(table)
        return self._log

    @property
    def stale(self) -> str:
        """Why the file could not be understood when it was last read; what stood in it before goes on."""
        return self._wrong

    @property
    def refused(self) -> str:
        """The same: a file is old only by being wrong."""
        return self._wrong

    def close(self) -> None:
        """There is nothing to let go of."""
