"""Commands and scripts for those who share one client between threads: coordinators and the command line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from redis.cluster import RedisCluster
from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

from inferfleet.control.keys import Script
from inferfleet.errors import ControlError
from inferfleet.redis_access import REDIS_ERRORS


class Calls:
    """Runs single commands and scripts; any thread may call it.

    ``connect`` returns a client that answers with bytes and does not retry; ``address`` names the server in
    errors. Each call waits as long as the client's own timeouts let it, and raises ControlError.
    """

    def __init__(self, connect: Callable[[], Any], address: str) -> None:
        self._connect = connect
        self._address = address
        self._lock = threading.Lock()
        self._client: Any = None

    def __repr__(self) -> str:
        return f"Calls({self._address})"

    def run(self, *command: Any) -> Any:
        """Run one command."""
        return self._tried(lambda client: client.execute_command(*command))

    def script(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script; a server that does not know it is taught it."""

        def call(client: Any) -> Any:
            words = ("EVALSHA", script.sha, len(keys), *keys, *args)
            try:
                return client.execute_command(*words)
            except NoScriptError:
                client.script_load(script.text)
                return client.execute_command(*words)

        return self._tried(call)

    def close(self) -> None:
        """Let go of the connections; a later call connects anew."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _tried(self, call: Callable[[Any], Any]) -> Any:
        client = None
        try:
            client = self._opened()
            return call(client)
        except REDIS_ERRORS as error:
            # An answer that says no leaves the connection as good as it was.
            if not isinstance(error, ResponseError) or isinstance(error, ReadOnlyError):
                self._broken(client)
            raise ControlError(f"redis at {self._address}: {error}") from None

    def _opened(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _broken(self, client: Any) -> None:
        """Forget connections that may be as broken as the one that failed; other threads keep theirs."""
        if isinstance(client, RedisCluster):
            with self._lock:
                if self._client is client:
                    self._client = None
            client.close()
        elif client is not None:
            client.connection_pool.disconnect(inuse_connections=False)
