"""The proxy that faults between a client and a server are made with."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends back what it gets; its port."""

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while chunk := client.recv(4096):
                client.sendall(chunk)

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(client,), daemon=True))
                threads[-1].start()

    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept, args=(listener,), daemon=True)
        acceptor.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        acceptor.join(5)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def connect(proxy: TcpProxy, timeout_s: float = 5.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout_s)


def ask(client: socket.socket, text: bytes) -> bytes:
    client.sendall(text)
    return client.recv(4096)


def test_bytes_pass_both_ways_and_an_end_is_passed_on(echo: int) -> None:
    """What one side sends the other gets, and so does the news that it will send no more."""
    with TcpProxy(echo) as proxy, connect(proxy) as client:
        assert ask(client, b"hello") == b"hello"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(10) == b""
        wait_until(lambda: not proxy.connections, 5, "the connection is forgotten")


def test_a_stalled_connection_is_silent_until_it_is_resumed(echo: int) -> None:
    """Nothing comes and nothing breaks, for old and new connections; afterwards nothing was lost."""
    with TcpProxy(echo) as proxy, connect(proxy, 0.2) as old:
        assert ask(old, b"before") == b"before"
        proxy.stall()
        with connect(proxy, 0.2) as new:
            for client in (old, new):
                with pytest.raises(TimeoutError):
                    ask(client, b"during")
            proxy.resume()
            for client in (old, new):
                client.settimeout(5)
                assert client.recv(4096) == b"during"


def test_dropped_connections_are_reset_and_new_ones_work(echo: int) -> None:
    """Both sides see an error, not an end in order, also while the proxy stalls."""
    with TcpProxy(echo) as proxy, connect(proxy) as first, connect(proxy) as second:
        assert ask(first, b"hello") == b"hello"
        assert ask(second, b"hello") == b"hello"
        proxy.stall()
        with connect(proxy) as third:
            wait_until(lambda: proxy.connections == 3, 5, "three connections are open")
            proxy.drop()
            for client in (first, second, third):
                with pytest.raises(ConnectionResetError):
                    client.recv(4096)
        proxy.resume()
        with connect(proxy) as again:
            assert ask(again, b"hello") == b"hello"


def test_a_stalled_proxy_does_not_say_that_the_server_is_gone(echo: int) -> None:
    """The server's reset reaches the client only when the proxy forwards again."""
    with TcpProxy(echo) as inner, TcpProxy(inner.port) as proxy, connect(proxy, 0.2) as client:
        assert ask(client, b"hello") == b"hello"
        proxy.stall()
        inner.drop()
        with pytest.raises(TimeoutError):
            client.recv(10)
        proxy.resume()
        client.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(10) == b""


def test_latency_delays_each_way_without_holding_back_what_follows(echo: int) -> None:
    """A round trip takes twice the latency, and many sent at once take no longer than one."""
    with TcpProxy(echo, latency_ms=50) as proxy, connect(proxy) as client:
        began_at = time.monotonic()
        for _ in range(20):
            client.sendall(b"x")
        got = 0
        while got < 20:
            got += len(client.recv(4096))
        took_s = time.monotonic() - began_at
        assert 0.1 <= took_s < 1.5


def test_a_connection_ends_when_nobody_listens_behind_the_proxy() -> None:
    """A server that is away looks like one that hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with TcpProxy(port) as proxy, connect(proxy) as client, contextlib.suppress(ConnectionResetError):
        assert client.recv(10) == b""


def test_a_url_leads_to_the_proxy_with_everything_else_unchanged() -> None:
    """User, password, path and query stay."""
    with TcpProxy(1) as proxy:
        at = f"127.0.0.1:{proxy.port}"
        assert proxy.url("amqp://u:p%40@host:5672/v?heartbeat=3") == f"amqp://u:p%40@{at}/v?heartbeat=3"
        assert proxy.url("redis://host/0") == f"redis://{at}/0"
