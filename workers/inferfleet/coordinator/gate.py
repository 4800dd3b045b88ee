"""What every request must pass before a handler sees it, in this order; nothing is let through by default.

The table knows its method and path; its Host is one of ours (a page under a name of its own may point that
name here); a write does not come from a page of another origin; its token is known and its role suffices;
it does not ask too often; its body is JSON of a bearable size and of the right shape.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from starlette.requests import Request

from inferfleet.coordinator.endpoints import Endpoint, Found, Matcher
from inferfleet.coordinator.handlers import Asked
from inferfleet.coordinator.limits import RateLimit
from inferfleet.coordinator.refusals import RefusedError, not_found
from inferfleet.coordinator.tokens import LOCAL, Caller, Role, TokenBook

MAX_BODY_BYTES = 1_000_000
BODY_S = 10.0
REQUESTS_PER_S = 50.0
REQUESTS_AT_ONCE = 200
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
SAFE = frozenset({"GET", "HEAD"})

_NOBODY = Caller("", Role.VIEWER, frozenset())


class Gate:
    """Turns requests into what handlers are asked; raises RefusedError for all others.

    ``tokens`` ``None`` lets everybody be ``local``; ``hosts`` are the names, without a port, under which this
    replica is reached. ``clock`` returns monotonic seconds.
    """

    def __init__(
        self,
        tokens: TokenBook | None,
        hosts: Iterable[str],
        clock: Callable[[], float],
        matcher: Matcher | None = None,
    ) -> None:
        self._tokens = tokens
        self._hosts = frozenset(each.lower() for each in hosts)
        self._limit = RateLimit(REQUESTS_PER_S, REQUESTS_AT_ONCE, clock)
        self._matcher = matcher or Matcher()

    def find(self, request: Request) -> Found:
        """Return the endpoint that a request is for."""
        found = self._matcher.find(request.method, request.scope["path"])
        if isinstance(found, Found):
            return found
        if not found:
            raise not_found("no such path; /openapi.json describes those that there are")
        allowed = ", ".join(sorted(found))
        raise RefusedError(405, "E_METHOD", f"this path has only {allowed}", headers={"allow": allowed})

    async def admit(self, request: Request, found: Found) -> Asked:
        """Return what the handler is asked."""
        endpoint = found.endpoint
        self._check_host(request)
        if request.method not in SAFE:
            _check_origin(request)
        caller = self._admitted(request, endpoint)
        if_match = _if_match(request, endpoint)
        query = _query(request, endpoint)
        body = None if endpoint.body is None else await _body(request, endpoint.body)
        return Asked(caller, found.parts, query, body, if_match)

    def _check_host(self, request: Request) -> None:
        given = request.headers.getlist("host")
        if len(given) != 1 or _host_name(given[0]) not in self._hosts:
            text = "this coordinator does not go by that name; [coordinator] hosts lists its names"
            raise RefusedError(421, "E_HOST", text)

    def _admitted(self, request: Request, endpoint: Endpoint) -> Caller:
        """Return whose token it is, if it may do this and has not asked too often."""
        peer = f"peer {request.client.host if request.client else ''}"
        if endpoint.role is None:
            self._count(peer)
            return _NOBODY
        caller = LOCAL if self._tokens is None else self._by_token(request, self._tokens)
        if caller is None:
            self._count(peer)
            text = "a token is needed: Authorization: Bearer …"
            raise RefusedError(401, "E_UNAUTHORIZED", text, headers={"www-authenticate": "Bearer"})
        self._count(f"token {caller.name}")
        if caller.role < endpoint.role:
            text = f"this needs the role {endpoint.role.word}; the token has {caller.role.word}"
            raise RefusedError(403, "E_FORBIDDEN", text)
        return caller

    def _by_token(self, request: Request, tokens: TokenBook) -> Caller | None:
        given = request.headers.getlist("authorization")
        if len(given) != 1:
            return None
        scheme, _, token = given[0].partition(" ")
        return tokens.caller(token.strip()) if scheme.lower() == "bearer" else None

    def _count(self, identity: str) -> None:
        wait_s = self._limit.wait_s(identity)
        if wait_s:
            headers = {"retry-after": str(int(wait_s) + 1)}
            raise RefusedError(429, "E_RATE", "too many requests", retryable=True, headers=headers)


def _host_name(host: str) -> str:
    """Return a Host header's name without its port, in small letters."""
    name, colon, port = host.strip().lower().rpartition(":")
    return name if colon and port.isdecimal() else host.strip().lower()


def _check_origin(request: Request) -> None:
    """Refuse what a page of another origin sends; browsers name the origin with every write."""
    for origin in request.headers.getlist("origin"):
        _, _, host = origin.partition("://")
        if host.lower() != request.headers.get("host", "").lower():
            raise RefusedError(403, "E_ORIGIN", "web pages of another origin may not do this")


def _if_match(request: Request, endpoint: Endpoint) -> str | None:
    given = request.headers.getlist("if-match")
    if endpoint.conditional and not given:
        text = "If-Match is needed: the ETag of what is to be changed"
        raise RefusedError(428, "E_PRECONDITION", text)
    return ", ".join(given) if given else None


def _query(request: Request, endpoint: Endpoint) -> Any:
    pairs = request.query_params.multi_items()
    values = dict(pairs)
    if len(values) < len(pairs):
        raise RefusedError(400, "E_INVALID", "a parameter is given twice")
    try:
        return msgspec.convert(values, endpoint.query, strict=False)
    except msgspec.ValidationError as error:
        raise RefusedError(400, "E_INVALID", f"parameters: {error}") from None


async def _body(request: Request, kind: type[msgspec.Struct]) -> Any:
    media, _, _ = request.headers.get("content-type", "").partition(";")
    if media.strip().lower() != "application/json":
        raise RefusedError(415, "E_CONTENT_TYPE", "content-type must be application/json")
    try:
        body = await asyncio.wait_for(_read(request), BODY_S)
    except TimeoutError:
        raise RefusedError(408, "E_TIMEOUT", "the body did not come in time", retryable=True) from None
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RefusedError(400, "E_INVALID", f"the body: {error}") from None
    except RecursionError:
        raise RefusedError(400, "E_INVALID", "the body is nested too deeply") from None


async def _read(request: Request) -> bytes:
    too_large = RefusedError(413, "E_TOO_LARGE", f"a body has at most {MAX_BODY_BYTES} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise too_large
        parts.append(part)
    return b"".join(parts)
