"""The real servers that other tests stand on: each answers, keeps its data, and can be frozen."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import aio_pika
import pytest
import redis
from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from tests.conftest import TopicFactory
from tests.support.process import ServerError, ServerProcess, accepts
from tests.support.servers import ClientConfig, KafkaServer, RabbitServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service


def produce(config: ClientConfig, topic: str, *values: bytes) -> list[str]:
    """Send values and return the name of each one's error, nothing for those that were accepted."""
    errors: list[str] = []
    producer = Producer({**config, "message.timeout.ms": 10_000, "linger.ms": 0, "log_level": 0})
    for value in values:
        producer.produce(
            topic, value, on_delivery=lambda error, _: errors.append(error.name()) if error else None
        )
    assert producer.flush(20) == 0
    return errors


def consume(config: ClientConfig, topic: str, count: int, **extra: object) -> list[bytes]:
    """Read ``count`` values of a topic from its start, as a member of a group."""
    consumer = Consumer(
        {**config, "group.id": f"{topic}.readers", "auto.offset.reset": "earliest", "log_level": 0, **extra}
    )
    consumer.subscribe([topic])
    found: list[bytes] = []
    try:

        def all_read() -> bool:
            message = consumer.poll(0.2)
            if message is not None:
                if message.error():
                    raise KafkaException(message.error())
                found.append(message.value())
            return len(found) >= count

        wait_until(all_read, 20, f"{count} records of {topic}")
    finally:
        consumer.close()
    return found


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_kafka_gives_back_what_was_sent_with_both_group_protocols(
    kafka: KafkaServer, topic: TopicFactory, protocol: str
) -> None:
    """A record that was accepted is read again by a group member of either protocol."""
    name = topic("plain", partitions=2)
    assert produce(kafka.client_config(), name, b"one", b"two") == []
    extra = {"group.protocol": protocol}
    assert sorted(consume(kafka.client_config(), name, 2, **extra)) == [b"one", b"two"]


def test_kafka_does_not_create_a_topic_that_nobody_asked_for(kafka: KafkaServer) -> None:
    """Sending to an unknown topic fails; it does not make the topic."""
    config = {**kafka.client_config(), "topic.metadata.propagation.max.ms": 1000}
    assert produce(config, "nobody-made-this", b"x") == ["UNKNOWN_TOPIC_OR_PART"]
    assert "nobody-made-this" not in kafka.admin().list_topics(timeout=10).topics


def test_a_killed_kafka_keeps_its_records_and_a_paused_one_goes_on(data_folder: Path) -> None:
    """After a kill and a new start the records are there; a frozen broker answers only when resumed."""
    with KafkaServer(data_folder) as server:
        server.create_topics({"kept": 1})
        assert produce(server.client_config(), "kept", b"before") == []
        server.kill()
        assert not accepts(server.port)
        server.start()
        assert consume(server.client_config(), "kept", 1) == [b"before"]

        server.pause()
        producer = Producer({**server.client_config(), "log_level": 0})
        producer.produce("kept", b"during")
        assert producer.flush(0.5) == 1, "a frozen broker confirmed a record"
        server.resume()
        assert producer.flush(20) == 0


def test_secure_kafka_denies_what_no_rule_allows(secure_kafka: KafkaServer) -> None:
    """A user may do nothing at first, then exactly what a rule says; with a wrong password never anything."""
    secure_kafka.create_topics({"guarded": 1, "other": 1})
    alice = secure_kafka.client_config("alice")
    assert produce(alice, "guarded", b"denied") == ["TOPIC_AUTHORIZATION_FAILED"]

    secure_kafka.apply_acls(
        """
        # Alice writes, Bob reads as a member of his group.
        kafka-acls.sh --bootstrap-server ignored:1 --add --allow-principal User:alice \\
          --operation Write --topic guarded
        --add --allow-principal User:bob --operation Read --topic guarded
        --add --allow-principal User:bob --operation READ --group guarded. --resource-pattern-type prefixed
        """
    )
    wait_until(lambda: not produce(alice, "guarded", b"allowed"), 15, "alice may write")
    assert produce(alice, "other", b"denied") == ["TOPIC_AUTHORIZATION_FAILED"]
    assert consume(secure_kafka.client_config("bob"), "guarded", 1) == [b"allowed"]
    with pytest.raises(KafkaException, match="authorization"):
        consume(alice, "guarded", 1)

    stranger = AdminClient({**alice, "sasl.password": "wrong", "log_level": 0})
    with pytest.raises(KafkaException):
        stranger.list_topics(timeout=3)


def test_redis_keeps_its_keys_over_a_kill_and_waits_while_paused(data_folder: Path) -> None:
    """A key that was confirmed is there after a kill; a frozen server lets calls time out."""
    with RedisServer(data_folder) as server, server.client() as client:
        client.set("answer", "42")
        server.kill()
        server.start()
        assert client.get("answer") == b"42"

        server.pause()
        hasty = redis.Redis.from_url(server.url, socket_timeout=0.3, retry=None)
        with hasty, pytest.raises(redis.TimeoutError):
            hasty.ping()
        server.resume()
        assert client.get("answer") == b"42"


def test_the_shared_redis_answers(redis_server: RedisServer) -> None:
    """The server of the whole run is usable."""
    with redis_server.client() as client:
        client.set("shared", "yes", ex=60)
        assert client.get("shared") == b"yes"


def test_rabbitmq_confirms_and_keeps_a_durable_message_over_a_restart(rabbitmq: RabbitServer) -> None:
    """A persistent message on a quorum queue that was confirmed is delivered after a restart."""

    async def publish() -> None:
        async with await aio_pika.connect(rabbitmq.url) as connection:
            channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            await channel.declare_queue("kept", durable=True, arguments={"x-queue-type": "quorum"})
            message = aio_pika.Message(b"hello", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await channel.default_exchange.publish(message, "kept", timeout=10)

    async def get() -> bytes:
        async with await aio_pika.connect(rabbitmq.url) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue("kept", passive=True)
            message = await queue.get(timeout=10)
            assert message is not None
            await message.ack()
            return message.body

    asyncio.run(publish())
    rabbitmq.restart()
    assert asyncio.run(get()) == b"hello"


def test_a_server_that_ends_while_starting_is_reported_with_its_log(data_folder: Path) -> None:
    """A start that fails says so at once and shows what the server wrote."""
    server = RedisServer(data_folder, config=("--no-such-option", "1"))
    with pytest.raises(ServerError, match=r"(?s)Redis ended while starting.*no-such-option"):
        server.start()


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """A server whose parent is killed does not stay behind."""
    parent = ServerProcess("parent", tmp_path / "parent.log")
    script = (
        "import sys, time; from pathlib import Path; from tests.support.servers import RedisServer\n"
        "server = RedisServer(Path(sys.argv[1])); server.start(); print('port', server.port, flush=True)\n"
        "time.sleep(60)"
    )
    parent.start(
        [sys.executable, "-c", script, str(tmp_path / "redis")], cwd=Path(__file__).resolve().parents[2]
    )
    try:
        parent.wait_ready(lambda: "port" in parent.log_tail(), 20)
        port = int(parent.log_tail().split("port")[1].split()[0])
        assert accepts(port)
        parent.kill()
        wait_until(lambda: not accepts(port), 10, "the server ended with its parent")
    finally:
        parent.kill()
