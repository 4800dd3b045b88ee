"""The admin address of a process: probes, metrics and status over HTTP, on a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

import msgspec
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from inferfleet.errors import ConfigError

log = structlog.get_logger(__name__)


class Health(NamedTuple):
    """Whether the process lives and may be given work; ``reasons`` say why it is not ready."""

    live: bool
    ready: bool
    reasons: tuple[str, ...] = ()


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself at ``/status``, and what ``inferfleet status`` reads.

    ``paused`` maps a route to the reason; ``assignment`` maps a topic to its partitions.
    """

    worker: str
    group: str
    revision: str = ""
    ready: bool = False
    reasons: tuple[str, ...] = ()
    paused: dict[str, str] = {}
    assignment: dict[str, list[int]] = {}
    models: dict[str, str] = {}
    in_flight_rows: int = 0
    in_flight_bytes: int = 0
    oldest_request_seconds: float = 0.0


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
    is served before :meth:`start`. ``health`` and ``status`` are called on the server's threads.
    """

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        health: Callable[[], Health],
        status: Callable[[], object] | None = None,
        key: str = "[worker] admin_address",
    ) -> None:
        host, port = split_address(address, key)
        self._routes: dict[str, Callable[[str], tuple[int, str, bytes]]] = {
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
        routes = self._routes

        class Handler(_Handler):
            answers = routes

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
    answers: ClassVar[dict[str, Callable[[str], tuple[int, str, bytes]]]] = {}
    timeout = 5
    protocol_version = "HTTP/1.1"
    server_version = "inferfleet"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one of the known paths."""
        answer = self.answers.get(self.path.partition("?")[0])
        if answer is None:
            self._send(*_json(HTTPStatus.NOT_FOUND, {"error": "no such path", "paths": sorted(self.answers)}))
            return
        try:
            status, content_type, body = answer(self.headers.get("Accept", ""))
        except Exception:
            log.exception("admin_answer_failed", path=self.path)
            status, content_type, body = _json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "see the log"})
        self._send(status, content_type, body)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Probes come every few seconds: they are no events."""


def _probe(health: Health, *, live: bool) -> tuple[int, str, bytes]:
    good = health.live if live else health.live and health.ready
    return _json(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, health._asdict())


def _metrics(registry: CollectorRegistry, accept: str) -> tuple[int, str, bytes]:
    encode, content_type = choose_encoder(accept)
    return HTTPStatus.OK, content_type, encode(registry)


def _json(status: int, body: object) -> tuple[int, str, bytes]:
    return status, "application/json", msgspec.json.encode(body)
