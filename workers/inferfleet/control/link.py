"""A connection to the control plane's Redis that is made when it is needed and dropped when it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import structlog
from redis.exceptions import NoScriptError

from inferfleet.control.keys import Script

log = structlog.get_logger(__name__)


class Link:
    """Runs single commands. ``connect`` returns a client that answers with bytes and does not retry.

    Each call waits as long as the client's own timeouts let it.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._client: Any = None

    def run(self, *command: Any) -> Any:
        """Run one command; what it raises may be anything, and the next call connects anew."""
        try:
            if self._client is None:
                self._client = self._connect()
            return self._client.execute_command(*command)
        except Exception:
            self.drop()
            raise

    def script(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script, as :meth:`run` does; a server that does not know it is taught it."""
        words = ("EVALSHA", script.sha, len(keys), *keys, *args)
        try:
            return self.run(*words)
        except NoScriptError:
            self.run("SCRIPT LOAD", script.text)
            return self.run(*words)

    def drop(self) -> None:
        """Let go of the connection; from another thread, this ends a read that hangs."""
        client, self._client = self._client, None
        if client is None:
            return
        try:
            pool = getattr(client, "connection_pool", None)
            if pool is not None:
                pool.disconnect()
            client.close()
        except Exception as error:
            log.debug("control_drop_failed", error=str(error))


class Outage:
    """Tells of a trouble once, and of its end, by the names of two log events."""

    def __init__(self, away: str, back: str) -> None:
        self._away = away
        self._back = back
        self._told = False

    def began(self, error: Exception) -> None:
        """Tell of ``error``, unless one was told since all was well."""
        if not self._told:
            self._told = True
            log.warning(self._away, error=str(error), kind=type(error).__name__)

    def over(self) -> None:
        """All is well again."""
        if self._told:
            self._told = False
            log.info(self._back)
