"""The RabbitMQ nodes that other tests stand on: alarms, rights, limits, clusters, and their clients."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pika
import pytest
from pika.exceptions import (
    AMQPHeartbeatTimeout,
    ChannelClosedByBroker,
    ConnectionBlockedTimeout,
    UnroutableError,
)

from tests.support.process import ServerError
from tests.support.rabbitmq_publisher import SteadyPublisher
from tests.support.rabbitmq_queues import DIRECT_REPLY
from tests.support.servers import RabbitServer
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service


@pytest.fixture
def queue(rabbitmq: RabbitServer) -> Iterator[str]:
    """A quorum queue with a name that no other test has."""
    name = f"queue.{secrets.token_hex(4)}"
    rabbitmq.declare(name)
    yield name
    rabbitmq.delete_queue(name)


def test_messages_come_back_with_their_properties(rabbitmq: RabbitServer, queue: str) -> None:
    """What is published to an exchange or a queue is taken with body, headers and ids, and is gone then."""
    exchange = f"exchange.{queue}"
    rabbitmq.declare_exchange(exchange)
    rabbitmq.bind(queue, exchange, "key")
    rabbitmq.publish("key", b"one", exchange=exchange, headers={"h": "v"}, message_id="m-1")
    rabbitmq.publish(queue, b"two", b"three")

    first, *others = rabbitmq.take(queue, 3)

    assert (first.body, first.headers["h"], first.properties.message_id) == (b"one", "v", "m-1")
    assert [each.body for each in others] == [b"two", b"three"]
    assert rabbitmq.get(queue) is None
    with pytest.raises(UnroutableError):
        rabbitmq.publish("no-such-queue", b"lost")
    rabbitmq.delete_exchange(exchange)


def test_depth_and_unacked_count_what_is_ready_and_what_is_held(rabbitmq: RabbitServer, queue: str) -> None:
    """A message that a consumer holds is unacknowledged, not ready."""
    rabbitmq.publish(queue, *[b"x"] * 5)
    with rabbitmq.channel() as channel:
        channel.basic_get(queue)
        channel.basic_get(queue)
        assert (rabbitmq.depth(queue), rabbitmq.unacked(queue)) == (3, 2)
    rabbitmq.wait_depth(queue, 5)
    assert rabbitmq.exists(queue)
    assert not rabbitmq.exists(f"{queue}.other")


@pytest.mark.parametrize("alarm", [RabbitServer.set_memory_alarm, RabbitServer.set_disk_alarm])
def test_a_node_with_an_alarm_blocks_publishers_until_it_is_cleared(
    rabbitmq: RabbitServer, queue: str, alarm: Any
) -> None:
    """While the alarm is set nothing is confirmed; afterwards publishing works at once."""
    alarm(rabbitmq, True)
    try:
        with (
            pytest.raises(ConnectionBlockedTimeout),
            rabbitmq.channel(blocked_connection_timeout=0.5) as channel,
        ):
            channel.basic_publish("", queue, b"blocked")
    finally:
        alarm(rabbitmq, False)
    rabbitmq.publish(queue, b"through")


def test_a_user_may_do_what_its_rights_match_and_a_policy_holds(rabbitmq: RabbitServer, queue: str) -> None:
    """Reading is allowed by its pattern, writing is not without one; ``rabbitmqctl`` errors are raised."""
    name = f"user {queue}"
    url = rabbitmq.add_user(name, "p@ss/word", read="^queue\\.")
    connection = pika.BlockingConnection(pika.URLParameters(url))
    assert connection.channel().basic_get(queue) == (None, None, None)
    channel = connection.channel()
    channel.confirm_delivery()
    with pytest.raises(ChannelClosedByBroker, match="ACCESS_REFUSED"):
        channel.basic_publish("", queue, b"x")
    connection.close()
    with pytest.raises(ServerError, match="already exists"):
        rabbitmq.add_user(name, "again")

    rabbitmq.policy(queue, f"^{queue}$", delivery_limit=7)
    rows = rabbitmq.list_queues("name", "policy")
    assert {"name": queue, "policy": queue} in rows
    rabbitmq.clear_policy(queue)


@pytest.mark.parametrize("direct", [False, True])
def test_a_plain_rpc_client_gets_its_replies_in_order(
    rabbitmq: RabbitServer, queue: str, direct: bool
) -> None:
    """The test's own RPC client works with any responder, by an exclusive queue and by direct reply-to."""
    with responder(rabbitmq, queue):
        replies = rabbitmq.call(queue, b"a", b"b", b"c", direct=direct)
    assert [reply.body for reply in replies] == [b"re: a", b"re: b", b"re: c"]


@contextmanager
def responder(server: RabbitServer, queue: str) -> Iterator[None]:
    """Answer every request of a queue with its own body, from a thread."""
    stop = threading.Event()

    def answer(channel: Any, method: Any, asked: Any, body: bytes) -> None:
        properties = pika.BasicProperties(correlation_id=asked.correlation_id)
        # RabbitMQ 3.10 returns a mandatory direct reply as unroutable although it delivers it.
        mandatory = not asked.reply_to.startswith(DIRECT_REPLY)
        channel.basic_publish("", asked.reply_to, b"re: " + body, properties, mandatory=mandatory)
        channel.basic_ack(method.delivery_tag)

    def serve() -> None:
        with server.channel() as channel:
            channel.basic_consume(queue, answer)
            while not stop.is_set():
                channel.connection.process_data_events(0.05)

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_delivery_that_is_held_too_long_closes_its_channel(data_folder: Path) -> None:
    """Lines of both settings files count: the node looks every 300 ms for deliveries held over 1.5 s."""
    config, advanced = ["consumer_timeout = 1500"], "{channel_tick_interval, 300}"
    with RabbitServer(data_folder, config=config, advanced=advanced) as server:
        server.declare("held")
        server.publish("held", b"x")
        with server.channel() as channel:
            channel.basic_get("held")

            def closed() -> bool:
                channel.connection.process_data_events(0.05)
                return not channel.is_open

            wait_until(closed, 10, "the node closes the channel")
        server.wait_depth("held", 1)


def test_a_connection_that_is_silently_dead_is_noticed_by_heartbeat(
    rabbitmq: RabbitServer, queue: str
) -> None:
    """Behind a stalled proxy nothing is refused and nothing comes; only missing heartbeats tell."""
    with TcpProxy(rabbitmq.port) as proxy:
        parameters = pika.URLParameters(proxy.url(rabbitmq.url))
        parameters.heartbeat = 1
        connection = pika.BlockingConnection(parameters)
        channel = connection.channel()
        proxy.stall()

        def dead() -> bool:
            try:
                connection.process_data_events(0.05)
            except AMQPHeartbeatTimeout:
                return True
            return False

        wait_until(dead, 20, "the client misses heartbeats")
        assert not channel.is_open


def test_a_steady_publisher_leaves_every_message_in_the_queue(data_folder: Path) -> None:
    """Over a reset connection and a killed node each message is kept, some of them twice, none changed."""
    with RabbitServer(data_folder) as server, TcpProxy(server.port) as proxy:
        server.declare("kept")
        with SteadyPublisher(proxy.url(server.url)) as publisher:

            def some(first: int, count: int = 2_000) -> None:
                for number in range(first, first + count):
                    publisher.publish("kept", b"%d" % number, message_id=f"m-{number}")

            some(0)
            wait_until(lambda: publisher.confirmed, 20, "some are confirmed")
            proxy.drop()
            some(2_000)
            publisher.wait(60)
            some(4_000)
            server.kill()
            server.start()
            publisher.wait(60)
            publisher.publish("no-such-queue", b"astray")
            publisher.wait(10)
            assert [(each.key, each.body) for each in publisher.returned] == [("no-such-queue", b"astray")]
        found = server.take("kept", server.depth("kept"))
        assert {each.body for each in found} == {b"%d" % number for number in range(6_000)}
        assert len(found) - 6_000 <= publisher.repeated
        assert all(each.properties.message_id == f"m-{each.body.decode()}" for each in found)
