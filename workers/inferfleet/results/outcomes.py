"""Outcomes of a route as they stand in Redis, for a shadow in another pool."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, Full, Queue
from typing import Any

import structlog

from inferfleet.ports import Heard
from inferfleet.redis_access import REDIS_ERRORS
from inferfleet.wire.stored import result_key

log = structlog.get_logger(__name__)

AT_ONCE = 500
WAITING = 64
PAUSE_S = 1.0
LOOK_S = 0.2
JOIN_S = 6.0


class RedisOutcomes:
    """Implements :class:`~inferfleet.ports.OutcomeFeed`; a thread looks for what was asked for, in batches.

    Each question is answered once, by what stands then: who still misses an outcome asks again.
    """

    def __init__(self, connect: Callable[[], Any], fleet: str, route: str) -> None:
        self._connect = connect
        self._fleet = fleet
        self._route = route
        self._asked: Queue[Sequence[str]] = Queue(WAITING)
        self._heard: Queue[Heard] = Queue(WAITING)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"outcomes-{route}", daemon=True)
        self._thread.start()

    def ask(self, ids: Sequence[str]) -> None:
        """Look for these; what is over the bound is not looked for until it is asked for again."""
        try:
            self._asked.put_nowait(ids)
        except Full:
            return

    def poll(self) -> list[Heard]:
        """Return what has come."""
        found: list[Heard] = []
        try:
            while True:
                found.append(self._heard.get_nowait())
        except Empty:
            return found

    def close(self, *, wait: bool = True) -> None:
        """Stop looking."""
        self._stopping.set()
        if wait:
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        client: Any = None
        troubled = False
        while not self._stopping.is_set():
            try:
                ids = self._asked.get(timeout=LOOK_S)
            except Empty:
                continue
            try:
                client = client or self._connect()
                for at in range(0, len(ids), AT_ONCE):
                    self._look(client, ids[at : at + AT_ONCE])
                troubled = False
            except REDIS_ERRORS as error:
                if not troubled:
                    log.warning("outcomes_not_read", route=self._route, kind=type(error).__name__)
                troubled = True
                self._stopping.wait(PAUSE_S)
        if client is not None:
            client.close()

    def _look(self, client: Any, ids: Sequence[str]) -> None:
        keys = [result_key(self._fleet, self._route, request_id) for request_id in ids]
        # On a cluster results do not share slots, and one command may not hold keys of several.
        get = getattr(client, "mget_nonatomic", client.mget)
        found = Heard([], [], [])
        for request_id, body in zip(ids, get(keys), strict=True):
            if body is not None:
                found.ids.append(request_id)
                found.bodies.append(body)
                found.json_lengths.append(None)
        while found.ids and not self._stopping.is_set():
            try:
                self._heard.put(found, timeout=LOOK_S)
            except Full:
                continue
            return
