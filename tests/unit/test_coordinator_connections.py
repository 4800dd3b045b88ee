"""Connections to a real server that say nothing, or too little: they are closed, and others are served."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import uvicorn

from inferfleet.coordinator import connections
from inferfleet.coordinator.connections import ImpatientProtocol
from tests.support.coordinator_bench import Bench
from tests.support.waiting import wait_until

WHOLE = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
BOUND_S = 20.0


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server that waits half a second for a request."""
    monkeypatch.setattr(connections, "REQUEST_S", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            Bench().application,
            http=ImpatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started, BOUND_S, "the server has started")
    yield int(listener.getsockname()[1])
    server.should_exit = True
    thread.join(BOUND_S)
    assert not thread.is_alive()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=BOUND_S)


def answered(connection: socket.socket) -> bytes:
    """Read one answer with a body whose length is told."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65_536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(
        next(x for x in head.lower().split(b"\r\n") if x.startswith(b"content-length")).split(b":")[1]
    )
    while len(body) < length:
        body += connection.recv(65_536)
    return head.split(b"\r\n")[0]


def closed(connection: socket.socket) -> bool:
    """Read until the other side ends it."""
    try:
        while connection.recv(65_536):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("said", [b"", b"G", WHOLE[:-2], b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_request_that_does_not_come_is_not_waited_for(port: int, said: bytes) -> None:
    """Nothing at all, or only a part of it."""
    with closing(connected(port)) as connection:
        connection.sendall(said)
        assert closed(connection)


def test_a_request_that_drips_in_is_not_waited_for(port: int) -> None:
    """Each byte is no reason to wait again."""
    with closing(connected(port)) as connection:
        connection.sendall(WHOLE[:-2])

        def refused() -> bool:
            try:
                connection.sendall(b"X: y\r\n")
            except OSError:
                return True
            return False

        wait_until(refused, BOUND_S, "the connection is closed", every_s=0.05)


def test_a_connection_may_be_used_again_and_is_let_go_when_it_is_not(port: int) -> None:
    """Answers first, then the end; a body that nobody wants is no request."""
    with closing(connected(port)) as connection:
        for _ in range(3):
            connection.sendall(WHOLE)
            assert answered(connection) == b"HTTP/1.1 200 OK"
        assert closed(connection)
    with closing(connected(port)) as connection:
        connection.sendall(WHOLE.replace(b"\r\n\r\n", b"\r\nContent-Length: 999\r\n\r\n"))
        assert answered(connection) == b"HTTP/1.1 200 OK"
        assert closed(connection)


def test_what_is_no_http_is_answered_400(port: int) -> None:
    """And others are served."""
    with closing(connected(port)) as wrong, closing(connected(port)) as right:
        wrong.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        right.sendall(WHOLE)
        assert answered(right) == b"HTTP/1.1 200 OK"
        assert closed(wrong)
