"""The ASGI application: the gate, a handler on one of a few threads, the answer with its headers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
import msgspec
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inferfleet.coordinator.endpoints import Found
from inferfleet.coordinator.gate import SAFE, Gate
from inferfleet.coordinator.handlers import Asked, Handlers, Reply
from inferfleet.coordinator.messages import ErrorBody
from inferfleet.coordinator.refusals import RefusedError, refusal_of

log = structlog.get_logger(__name__)

_SUBJECTS = {"name": "route", "id": "rollout"}
"""How a part of a path is called in the log."""
THREADS = 8
WAITING = 64
JSON = "application/json"
HEADERS: Mapping[str, str] = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""What every answer carries, refusals too."""

Result = TypeVar("Result")


class RequestMetrics(Protocol):
    """Who counts requests."""

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count one; ``path`` is the table's, or ``other``."""


class Threads:
    """Runs blocking calls on few threads; refuses when too many wait for one of them."""

    def __init__(self, threads: int = THREADS, waiting: int = WAITING) -> None:
        self._limiter = anyio.CapacityLimiter(threads)
        self._waiting = waiting

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Return what ``function(*args)`` returns on a thread; raises RefusedError where too much waits."""
        if self._limiter.statistics().tasks_waiting >= self._waiting:
            raise RefusedError(
                503, "E_BUSY", "too many requests wait", retryable=True, headers={"retry-after": "1"}
            )
        call = functools.partial(function, *args)
        return await anyio.to_thread.run_sync(call, limiter=self._limiter)


class Application:
    """Answers HTTP. It has no state of its own, so any number of replicas answer alike."""

    def __init__(
        self, gate: Gate, handlers: Handlers, metrics: RequestMetrics, threads: Threads | None = None
    ) -> None:
        self._gate = gate
        self._handlers = handlers
        self._metrics = metrics
        self._threads = threads or Threads()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; anything but HTTP is refused."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            raise RuntimeError(f"nothing here speaks {scope['type']}")
        began = time.monotonic()
        request = Request(scope, receive)
        found: Found | None = None
        try:
            found = self._gate.find(request)
            response = await self._answered(request, found)
        except ClientDisconnect:
            return
        except Exception as error:  # the last stop of every error: it becomes an answer
            response = _refused(request, error)
        path = "other" if found is None else found.endpoint.path
        method = request.method if found is not None else "other"
        self._metrics.request(method, path, response.status_code, time.monotonic() - began)
        await response(scope, receive, send)

    async def _answered(self, request: Request, found: Found) -> Response:
        asked = await self._gate.admit(request, found)
        handler = functools.partial(found.endpoint.handler, self._handlers)
        reply = await self._threads.run(handler, asked)
        status = found.endpoint.status if reply.status is None else reply.status
        if request.method not in SAFE:
            _tell(asked, found, status)
        return _response(status, reply, found.endpoint.media)


def _tell(asked: Asked, found: Found, status: int) -> None:
    named = {_SUBJECTS.get(part, part): name for part, name in found.parts.items()}
    log.info("change_answered", by=asked.caller.name, operation=found.endpoint.name, status=status, **named)


def _response(status: int, reply: Reply, media: str = JSON) -> Response:
    body = reply.body if isinstance(reply.body, bytes) else msgspec.json.encode(reply.body)
    headers = {**HEADERS, **reply.headers, "content-type": media}
    return Response(body, status, headers)


def _refused(request: Request, error: Exception) -> Response:
    refusal = refusal_of(error)
    if refusal.status == 500:
        log.exception("request_failed", method=request.method)
    elif refusal.status in (401, 403, 421):
        peer = request.client.host if request.client else ""
        log.warning("request_refused", code=refusal.code, peer=peer, method=request.method)
    body = ErrorBody(refusal.text, refusal.code, refusal.retryable)
    return _response(refusal.status, Reply(body, headers=refusal.headers))
