"""The admin address of a process: probes, metrics, status and pauses over HTTP, on a thread of its own."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeAlias

import msgspec
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from inferfleet.errors import ConfigError

log = structlog.get_logger(__name__)

Answer: TypeAlias = tuple[int, str, bytes]
"""Status, content type and body."""

MAX_BODY_BYTES = 4096
MAX_REASON = 200
_ROUTE_PATH = re.compile(r"/routes/([a-z0-9][a-z0-9-]{0,62})/(pause|resume)")


class Health(NamedTuple):
    """Whether the process lives and may be given work; ``reasons`` say why it is not ready."""

    live: bool
    ready: bool
    reasons: tuple[str, ...] = ()


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself at ``/status``, and what ``inferfleet status`` reads.

    ``paused`` maps a route to the reason; ``assignment`` maps a topic to its partitions. ``adopted`` maps a
    route to its newest revision here, ``refused`` a version to why it cannot be served; ``stale`` says why
    the routes may be old.
    """

    worker: str
    group: str
    revision: str = ""
    ready: bool = False
    reasons: tuple[str, ...] = ()
    paused: dict[str, str] = {}
    assignment: dict[str, list[int]] = {}
    models: dict[str, str] = {}
    adopted: dict[str, int] = {}
    refused: dict[str, str] = {}
    stale: str = ""
    in_flight_rows: int = 0
    in_flight_bytes: int = 0
    oldest_request_seconds: float = 0.0


class _PauseBody(msgspec.Struct, forbid_unknown_fields=True):
    """What may be said when a route is paused."""

    reason: str = ""


class Commands(NamedTuple):
    """What a ``POST`` may do; ``serves`` says whether this process has a route of that name."""

    pause: Callable[[str, str], object]
    resume: Callable[[str], object]
    serves: Callable[[str], bool]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 32

    def server_bind(self) -> None:
        # The standard server looks its own name up here, which may wait for a name server.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A client that went away in the middle is no event."""
        log.debug("admin_request_failed", exc_info=True)


def split_address(address: str, key: str) -> tuple[str, int]:
    """Return host and port of ``host:port`` or ``[v6]:port``; ``key`` names the setting in the error."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f'{key} = "{address}" is not an address such as "127.0.0.1:8471"')
    return host.strip("[]"), int(port)


class AdminServer:
    """Serves ``/healthz``, ``/livez``, ``/readyz``, ``/metrics`` and ``/status``.

    Binding happens here, so a port that is taken raises ConfigError before anything else starts; nothing
    is served before :meth:`start`. Every function given is called on the server's threads.

    With ``pause(route, reason)`` and ``resume(route)`` a ``POST`` to ``/routes/NAME/pause`` or ``/resume``
    calls them; ``serves`` says which routes there are. A ``POST`` must say that it carries JSON, which no web
    page can do elsewhere than at home without being asked first, and must not come from a page at all.
    """

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        health: Callable[[], Health],
        status: Callable[[], object] | None = None,
        key: str = "[worker] admin_address",
        *,
        pause: Callable[[str, str], object] | None = None,
        resume: Callable[[str], object] | None = None,
        serves: Callable[[str], bool] = lambda _: True,
    ) -> None:
        host, port = split_address(address, key)
        self._commands = Commands(pause, resume, serves) if pause and resume else None
        self._routes: dict[str, Callable[[str], Answer]] = {
            "/healthz": lambda _: _probe(health(), live=True),
            "/livez": lambda _: _probe(health(), live=True),
            "/readyz": lambda _: _probe(health(), live=False),
            "/metrics": lambda accept: _metrics(registry, accept),
        }
        if status is not None:
            self._routes["/status"] = lambda _: _json(HTTPStatus.OK, status())
        try:
            self._server = self._bind(host, port)
        except OSError as error:
            raise ConfigError(
                f'{key} = "{address}" cannot be used: {error.strerror}; '
                "choose another port, or 0 for any free one"
            ) from None
        self._thread: threading.Thread | None = None

    def _bind(self, host: str, port: int) -> _Server:
        family, *_, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        routes, given = self._routes, self._commands

        class Handler(_Handler):
            answers = routes
            commands = given

        class Server(_Server):
            address_family = family

        return Server((str(resolved[0]), port), Handler)

    @property
    def address(self) -> str:
        """The actual address, with the port that the system gave where 0 was asked for."""
        host, port = self._server.server_name, self._server.server_port
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def start(self) -> None:
        """Serve from now on, on a daemon thread."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.25}, name="admin", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()

    def __enter__(self) -> AdminServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, Callable[[str], Answer]]] = {}
    commands: ClassVar[Commands | None] = None
    timeout = 5
    protocol_version = "HTTP/1.1"
    server_version = "inferfleet"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one of the known paths."""
        answer = self.answers.get(self._path)
        if answer is None:
            known = sorted(self.answers)
            self._send(*_json(HTTPStatus.NOT_FOUND, {"error": "no such path", "paths": known}))
        else:
            self._answer(lambda: answer(self.headers.get("Accept", "")))

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        """Pause or resume a route."""
        # What is left unread of a body would be taken for the next request.
        self.close_connection = True
        self._answer(self._command)

    @property
    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _answer(self, question: Callable[[], Answer]) -> None:
        try:
            answer = question()
        except Exception:
            log.exception("admin_answer_failed", path=self._path)
            answer = _json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "see the log"})
        self._send(*answer)

    def _command(self) -> Answer:
        if self._path in self.answers:
            return _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "this path is only read")
        found = _ROUTE_PATH.fullmatch(self._path)
        if found is None or self.commands is None:
            return _refusal(HTTPStatus.NOT_FOUND, "POST goes to /routes/NAME/pause or /routes/NAME/resume")
        refused = self._not_from_a_tool()
        if refused is not None:
            return refused
        name, verb = found.groups()
        if not self.commands.serves(name):
            return _refusal(HTTPStatus.NOT_FOUND, f'no route of this worker is named "{name}"')
        try:
            said = self._said()
        except (msgspec.MsgspecError, ValueError) as error:
            return _refusal(HTTPStatus.BAD_REQUEST, f'the body must be empty or {{"reason": …}}: {error}')
        if verb == "resume":
            self.commands.resume(name)
            return _json(HTTPStatus.OK, {"route": name, "paused": False})
        reason = said or f"paused by {self.client_address[0]}"
        self.commands.pause(name, reason)
        log.warning("route_pause_asked", route=name, reason=reason, by=self.client_address[0])
        return _json(HTTPStatus.OK, {"route": name, "paused": True, "reason": reason})

    def _not_from_a_tool(self) -> Answer | None:
        """Return how a request is refused that a web page may have caused; ``None`` lets it pass.

        A page must ask before it sends JSON to another origin, and is not answered; a page that reaches
        this address under a name of its own is told by its origin, which browsers add to every POST.
        """
        if self.headers.get_content_type() != "application/json":
            text = "content-type must be application/json"
            return _refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, text)
        if "Origin" in self.headers:
            return _refusal(HTTPStatus.FORBIDDEN, "web pages may not do this")
        return None

    def _said(self) -> str:
        """Return the reason that the body gives."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= MAX_BODY_BYTES:
            raise ValueError(f"at most {MAX_BODY_BYTES} bytes")
        body = self.rfile.read(length)
        reason = msgspec.json.decode(body, type=_PauseBody).reason if body else ""
        return "".join(each if each.isprintable() else " " for each in reason)[:MAX_REASON].strip()

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Probes come every few seconds: they are no events."""


def _probe(health: Health, *, live: bool) -> Answer:
    good = health.live if live else health.live and health.ready
    return _json(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, health._asdict())


def _metrics(registry: CollectorRegistry, accept: str) -> Answer:
    encode, content_type = choose_encoder(accept)
    return HTTPStatus.OK, content_type, encode(registry)


def _json(status: int, body: object) -> Answer:
    return status, "application/json", msgspec.json.encode(body)


def _refusal(status: int, text: str) -> Answer:
    return _json(status, {"error": text})
