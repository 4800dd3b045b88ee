"""Pauses by hand: shared through the control plane's Redis, or told to one worker at its admin address."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

from inferfleet.config import Config
from inferfleet.control.pauses import Pause, decode_pause, encode_pause, pause_key
from inferfleet.errors import BrokerError
from inferfleet.redis_access import REDIS_ERRORS, control_place_of, open_redis
from inferfleet.telemetry.admin import split_address

ANSWER_S = 3.0
ADMIN_HINT = "`--admin HOST:PORT` pauses one worker without Redis"

Answer = TypeVar("Answer")


class SharedPauses:
    """The pauses that all workers of a fleet look at; every answer is waited for within a bound.

    Raises BrokerError, in one line with the mend, where Redis does not answer or forbids. Close it.
    """

    def __init__(self, config: Config, answer_s: float = ANSWER_S) -> None:
        self._fleet = config.fleet.name
        self._section = "redis" if config.control is None else "control"
        self._place = replace(control_place_of(config), timeout_s=answer_s)
        self._client: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def current(self, routes: Iterable[str]) -> dict[str, Pause]:
        """Return which of the routes are paused, and by what."""
        names = list(routes)
        if not names:
            return {}
        keys = [pause_key(self._fleet, name) for name in names]
        values = self._ask(lambda redis: redis.mget(keys))
        return {
            name: decode_pause(value) for name, value in zip(names, values, strict=True) if value is not None
        }

    def pause(self, route: str, reason: str, actor: str) -> Pause | None:
        """Pause a route; return the pause that stood already, which stays as it is."""
        by = f"operator on {socket.gethostname()}"
        pause = Pause(reason, time.time_ns() // 1_000_000, by, actor)
        key, value = pause_key(self._fleet, route), encode_pause(pause)
        if self._ask(lambda redis: redis.set(key, value, nx=True)):
            return None
        return self.current([route]).get(route)

    def resume(self, route: str) -> Pause | None:
        """Take a pause away, whoever set it, and return it; ``None`` if there was none."""
        key = pause_key(self._fleet, route)
        stood = self.current([route]).get(route)
        return stood if self._ask(lambda redis: redis.delete(key)) else None

    def _ask(self, question: Callable[[Any], Answer]) -> Answer:
        try:
            if self._client is None:
                self._client = open_redis(self._place)
            return question(self._client)
        except REDIS_ERRORS as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise BrokerError(
                f"Redis {self._place.shown} keeps the pauses and does not answer: {said}; "
                f"check [{self._section}] url, username and password ({ADMIN_HINT})"
            ) from None


def ask_admin(address: str, route: str, verb: str, reason: str = "", timeout_s: float = 5.0) -> None:
    """Pause or resume a route at one worker; raises BrokerError with what the worker says."""
    host, port = split_address(address, "--admin")
    body = json.dumps({"reason": reason} if reason else {})
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/routes/{quote(route, safe='')}/{verb}", body, headers)
        response = connection.getresponse()
        said = response.read(4096)
    except (http.client.HTTPException, OSError) as error:
        text = str(error) or type(error).__name__
        raise BrokerError(f"no worker answers at {address} ({text}); name its admin address") from None
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise BrokerError(f"the worker at {address} refuses: {_told(said, response.status)}")


def _told(said: bytes, status: int) -> str:
    try:
        return str(json.loads(said)["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"
