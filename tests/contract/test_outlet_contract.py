"""One suite for every outlet: memory broker, Kafka and RabbitMQ confirm or refuse each envelope once."""

from __future__ import annotations

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

from inferfleet.brokers.kafka_outlet import KafkaOutlet, producer_properties
from inferfleet.brokers.memory import MemoryBroker
from inferfleet.brokers.memory_outlet import MemoryOutlet
from inferfleet.brokers.rabbitmq_outlet import RabbitOutlet
from inferfleet.ports import Outlet, Refusal, RefusalKind
from inferfleet.records import Envelopes, Header, Stream
from inferfleet.testing.clock import FakeClock
from tests.contract.rabbitmq_bench import KEY, as_bytes, last_of_each, new_link, new_queue, read_all
from tests.support.kafka_server import KafkaServer
from tests.support.rabbitmq_server import RabbitServer
from tests.support.waiting import wait_until

PATIENCE_S = 30.0
CLIENT_LIMIT = 200_000


class Row(NamedTuple):
    """One record, as it goes in and as it is read back."""

    value: bytes | None
    key: bytes | None = None
    headers: tuple[Header, ...] = ()


class Receipts:
    """Counts what an outlet tells, and fails at once when anything is told twice or elsewhere."""

    def __init__(self, published: int) -> None:
        self.published = published
        self.confirmed_rows = 0
        self.refusals: dict[int, Refusal] = {}
        self._thread = threading.get_ident()

    @property
    def told(self) -> int:
        return self.confirmed_rows + len(self.refusals)

    def confirmed(self, count: int) -> None:
        assert threading.get_ident() == self._thread
        assert count > 0
        self.confirmed_rows += count
        assert self.told <= self.published

    def refused(self, index: int, refusal: Refusal) -> None:
        assert threading.get_ident() == self._thread
        assert 0 <= index < self.published
        assert index not in self.refusals
        self.refusals[index] = refusal
        assert self.told <= self.published


def envelopes(topic: str, rows: Sequence[Row]) -> Envelopes:
    return Envelopes(
        topic,
        [row.key for row in rows],
        [row.value for row in rows],  # type: ignore[misc]  # dead letters of tombstones are tombstones
        [list(row.headers) for row in rows],
    )


class Bench(ABC):
    """A broker, and a way to read back what it holds.

    ``missing`` is a destination that nobody has made. Headers with a value of ``too_wide`` bytes are more
    than a message may have there.
    """

    missing = "nobody.made.this"
    too_wide = 5000

    def __init__(self) -> None:
        self.outlet = self.make()

    @abstractmethod
    def make(self, **properties: Any) -> Outlet: ...

    @abstractmethod
    def topic(self, partitions: int = 1, max_bytes: int | None = None) -> str: ...

    @abstractmethod
    def read(self, topic: str) -> list[list[Row]]: ...

    def kept(self, row: Row) -> Row:
        """Return a record as it is read back."""
        return row

    def publish(self, topic: str, rows: Sequence[Row]) -> Receipts:
        """Publish and wait until every row is told."""
        receipts = self.hand_over(topic, rows)
        self.until_told(receipts)
        return receipts

    def hand_over(self, topic: str, rows: Sequence[Row]) -> Receipts:
        receipts = Receipts(len(rows))
        self.outlet.publish(envelopes(topic, rows), receipts)
        return receipts

    def until_told(self, *receipts: Receipts) -> None:
        def all_told() -> bool:
            self.outlet.poll(0.02)
            return all(each.told == each.published for each in receipts)

        wait_until(all_told, PATIENCE_S, "every envelope is confirmed or refused", every_s=0.001)

    def held(self, topic: str) -> list[Row]:
        return [row for rows in self.read(topic) for row in rows]

    def close(self) -> None:
        self.outlet.close(5.0)


class MemoryBench(Bench):
    """The memory broker; the client's limit is the topic's."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.broker = MemoryBroker(self.clock, wait=self.clock.advance)
        super().__init__()

    def make(self, **properties: Any) -> Outlet:
        return MemoryOutlet(self.broker)

    def topic(self, partitions: int = 1, max_bytes: int | None = None) -> str:
        name = f"outlet.{secrets.token_hex(4)}"
        self.broker.create_topic(name, partitions, max_message_bytes=max_bytes or CLIENT_LIMIT)
        return name

    def read(self, topic: str) -> list[list[Row]]:
        found: list[list[Row]] = [[] for _ in range(self.broker.partitions(topic))]
        for number, rows in enumerate(found):
            for record in self.broker.log(Stream(topic, number)).records:
                rows.append(Row(record.value, record.key, tuple(record.headers or ())))
        return found


class KafkaBench(Bench):
    """A real broker."""

    def __init__(self, server: KafkaServer) -> None:
        self.server = server
        self.config = {**server.client_config(), "log_level": 0}
        self._partitions: dict[str, int] = {}
        super().__init__()

    def make(self, **properties: Any) -> Outlet:
        return KafkaOutlet(producer_properties(self.config, properties, CLIENT_LIMIT))

    def topic(self, partitions: int = 1, max_bytes: int | None = None) -> str:
        name = f"outlet.{secrets.token_hex(4)}"
        config = {} if max_bytes is None else {"max.message.bytes": str(max_bytes)}
        self.server.create_topics({name: partitions}, config=config)
        self._partitions[name] = partitions
        return name

    def read(self, topic: str) -> list[list[Row]]:
        """Read every partition from its start to the end that it has now."""
        consumer = Consumer({**self.config, "group.id": "reader", "enable.auto.commit": False})
        found: list[list[Row]] = [[] for _ in range(self._partitions[topic])]
        ends = [
            consumer.get_watermark_offsets(TopicPartition(topic, n), timeout=10)[1] for n in range(len(found))
        ]
        consumer.assign([TopicPartition(topic, n, OFFSET_BEGINNING) for n in range(len(found))])

        def all_read() -> bool:
            for message in consumer.consume(500, 0.05):
                assert message.error() is None
                headers = tuple(message.headers() or ())
                found[message.partition()].append(Row(message.value(), message.key(), headers))
            return [len(rows) for rows in found] >= ends

        wait_until(all_read, PATIENCE_S, f"{ends} records of {topic} are read")
        consumer.close()
        return found


class RabbitBench(Bench):
    """A real node; a destination is a queue of its own."""

    missing = "rabbitmq:nobody.made.this/key"
    too_wide = 150_000  # headers must fit into one frame

    def __init__(self, server: RabbitServer) -> None:
        self.server = server
        self.link = new_link(server)
        self._read: dict[str, list[Any]] = {}
        super().__init__()

    def make(self, **properties: Any) -> Outlet:
        return RabbitOutlet(self.link, max_message_bytes=CLIENT_LIMIT)

    def topic(self, partitions: int = 1, max_bytes: int | None = None) -> str:
        return new_queue(self.server)

    def kept(self, row: Row) -> Row:
        return Row(row.value or b"", row.key, tuple(sorted(last_of_each(row.headers))))

    def read(self, topic: str) -> list[list[Row]]:
        seen = read_all(self.server, topic, self._read.setdefault(topic, []))
        rows = []
        for _, properties, body in seen:
            table = dict(properties.headers or {})
            table.pop("x-delivery-count", None)  # the node's own
            key = as_bytes(table.pop(KEY, None))
            headers = sorted((name, as_bytes(value)) for name, value in table.items())
            rows.append(Row(body, key, tuple(headers)))
        return [rows]

    def close(self) -> None:
        super().close()
        self.link.close()


EVERY = ["memory", pytest.param("kafka", marks=pytest.mark.service)]


@pytest.fixture(params=[*EVERY, pytest.param("rabbitmq", marks=pytest.mark.service)])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Every outlet in turn."""
    made = new_bench(request)
    yield made
    made.close()


@pytest.fixture(params=EVERY)
def topical(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Every outlet to topics with limits of their own: RabbitMQ has one limit, the node's."""
    made = new_bench(request)
    yield made
    made.close()


def new_bench(request: pytest.FixtureRequest) -> Bench:
    if request.param == "memory":
        return MemoryBench()
    if request.param == "rabbitmq":
        return RabbitBench(request.getfixturevalue("rabbitmq"))
    return KafkaBench(request.getfixturevalue("kafka"))


@pytest.fixture
def kafka_bench(kafka: KafkaServer) -> Iterator[KafkaBench]:
    """The real one, for what only a client of its own can show."""
    made = KafkaBench(kafka)
    yield made
    made.outlet.close(5.0)


def numbered(count: int, size: int = 10) -> list[Row]:
    return [Row(b"%0*d" % (size, n), b"k%d" % (n % 7), (("n", b"%d" % n),)) for n in range(count)]


def test_every_envelope_is_confirmed_once_and_is_there(bench: Bench) -> None:
    """A confirmation means that the record can be read; nothing is pending afterwards."""
    topic = bench.topic(3)
    rows = numbered(1000)
    receipts = bench.publish(topic, rows)
    assert receipts.confirmed_rows == 1000
    assert not receipts.refusals
    assert bench.outlet.pending() == 0
    assert sorted(bench.held(topic), key=lambda row: row.value or b"") == rows


def test_pending_counts_what_is_neither_confirmed_nor_refused(bench: Bench) -> None:
    """Handing over never tells a receipt: news comes with a poll."""
    topic = bench.topic()
    receipts = bench.hand_over(topic, numbered(10))
    assert receipts.told == 0
    assert bench.outlet.pending() == 10
    bench.until_told(receipts)
    assert bench.outlet.pending() == 0


def test_keys_values_and_headers_arrive_untouched(bench: Bench) -> None:
    """None, empty and repeated ones included, as far as the broker can carry them."""
    rows = [
        Row(b"plain"),
        Row(None, b"tombstone", (("a", b"1"),)),
        Row(b"", b""),
        Row(b"\x00\xff", b"\xff", (("a", b"1"), ("a", b"2"), ("null", None), ("Upper", b""))),
    ]
    topic = bench.topic()
    bench.publish(topic, rows)
    assert bench.held(topic) == [bench.kept(row) for row in rows]


def test_records_of_one_key_keep_their_order(bench: Bench) -> None:
    """Over many groups, and in one partition each."""
    topic = bench.topic(4)
    rows = numbered(600)
    told = [bench.hand_over(topic, rows[at : at + 50]) for at in range(0, 600, 50)]
    bench.until_told(*told)
    by_partition = bench.read(topic)
    for n in range(7):
        key = b"k%d" % n
        (found,) = [mine for rows_ in by_partition if (mine := [row for row in rows_ if row.key == key])]
        assert found == [row for row in rows if row.key == key]


def test_what_is_too_large_is_refused_alone(bench: Bench) -> None:
    """The refusal names the right one; its neighbours, equal to it in key, are confirmed."""
    topic = bench.topic()
    rows = [Row(b"small", b"k"), Row(b"x" * (CLIENT_LIMIT + 1), b"k"), Row(b"small", b"k"), Row(b"end", b"k")]
    receipts = bench.publish(topic, rows)
    assert {i: refusal.kind for i, refusal in receipts.refusals.items()} == {1: RefusalKind.TOO_LARGE}
    assert receipts.confirmed_rows == 3
    assert [row.value for row in bench.held(topic)] == [b"small", b"small", b"end"]


def test_a_topics_own_limit_refuses_only_what_is_over_it(topical: Bench) -> None:
    """A topic may take less than the client would send: records that fit pass, however many come at once."""
    topic = topical.topic(max_bytes=3000)
    rows = [Row(b"%03d" % n + b"x" * 300, b"k", (("n", b"%d" % n),)) for n in range(60)]
    rows[17] = Row(b"y" * 5000, b"k", (("n", b"17"),))
    rows[42] = Row(b"z" * 5000, b"k", (("n", b"42"),))
    receipts = topical.publish(topic, rows)
    assert {i: r.kind for i, r in receipts.refusals.items()} == dict.fromkeys((17, 42), RefusalKind.TOO_LARGE)
    assert receipts.confirmed_rows == 58
    assert [row for n, row in enumerate(rows) if n not in (17, 42)] == topical.held(topic)


def test_equal_records_that_differ_in_headers_are_told_apart(bench: Bench) -> None:
    """Dead letters of equal bodies differ in their origin alone: the refusal names the right one."""
    topic = bench.topic(max_bytes=3000)
    rows = [Row(b"same", None, (("n", b"%d" % n),)) for n in range(6)]
    rows[4] = Row(b"same", None, (("n", b"4"), ("padding", b"x" * bench.too_wide)))
    receipts = bench.publish(topic, rows)
    assert list(receipts.refusals) == [4]
    assert sorted(row.headers[0][1] or b"" for row in bench.held(topic)) == [b"0", b"1", b"2", b"3", b"5"]


def test_an_unknown_topic_is_denied(bench: Bench) -> None:
    """Each envelope is refused, and other topics go on."""
    topic = bench.topic()
    receipts = bench.hand_over(bench.missing, numbered(3))
    others = bench.hand_over(topic, numbered(5))
    bench.until_told(receipts, others)
    assert {i: refusal.kind for i, refusal in receipts.refusals.items()} == dict.fromkeys(
        range(3), RefusalKind.DENIED
    )
    assert others.confirmed_rows == 5
    assert bench.outlet.pending() == 0


def test_a_receipt_may_publish(bench: Bench) -> None:
    """What a refusal leads to is handed over from inside it, and is told in its own time."""
    topic = bench.topic()
    inner = Receipts(1)

    class Chained(Receipts):
        def refused(self, index: int, refusal: Refusal) -> None:
            super().refused(index, refusal)
            bench.outlet.publish(envelopes(topic, [Row(b"instead")]), inner)

    outer = Chained(1)
    bench.outlet.publish(envelopes(topic, [Row(b"x" * (CLIENT_LIMIT + 1))]), outer)
    bench.until_told(outer, inner)
    assert inner.confirmed_rows == 1
    assert bench.held(topic) == [Row(b"instead")]


def test_close_waits_for_what_is_pending(bench: Bench) -> None:
    """With time enough nothing stays unconfirmed."""
    topic = bench.topic()
    receipts = bench.hand_over(topic, numbered(500))
    assert bench.outlet.close(PATIENCE_S) == 0
    assert receipts.confirmed_rows == 500
    assert len(bench.held(topic)) == 500


# What the memory outlet adds


def test_what_is_held_back_is_unconfirmed_until_it_is_let_through() -> None:
    """A held envelope is nowhere; one that was let through is durable before it is confirmed."""
    bench = MemoryBench()
    topic = bench.topic()
    outlet = MemoryOutlet(bench.broker, holding=True)
    receipts = Receipts(3)
    outlet.publish(envelopes(topic, numbered(3)), receipts)
    outlet.poll()
    assert (receipts.told, outlet.pending(), bench.held(topic)) == (0, 3, [])
    assert outlet.let_through(2) == 2
    assert (receipts.told, outlet.pending(), len(bench.held(topic))) == (0, 3, 2)
    outlet.poll()
    assert (receipts.told, outlet.pending()) == (2, 1)
    assert outlet.close(1.0) == 1


def test_a_vanished_outlet_loses_what_is_queued_and_tells_nobody() -> None:
    """As with a killed process: durable records stay, receipts hear nothing more."""
    bench = MemoryBench()
    topic = bench.topic()
    outlet = MemoryOutlet(bench.broker, holding=True)
    receipts = Receipts(3)
    outlet.publish(envelopes(topic, numbered(3)), receipts)
    outlet.let_through(1)
    outlet.vanish()
    outlet.poll()
    assert receipts.told == 0
    assert len(bench.held(topic)) == 1


@pytest.mark.parametrize("kind", [RefusalKind.LATER, RefusalKind.DENIED, RefusalKind.TOO_LARGE])
def test_a_topic_can_be_told_to_refuse(kind: RefusalKind) -> None:
    """It refuses what it was told to, and accepts again when it is told so."""
    bench = MemoryBench()
    topic = bench.topic()
    bench.broker.refuse(topic, kind, when=lambda record: record.key == b"k1")
    receipts = bench.publish(topic, numbered(7))
    assert {i: refusal.kind for i, refusal in receipts.refusals.items()} == {1: kind}
    bench.broker.accept(topic)
    assert bench.publish(topic, numbered(7)).confirmed_rows == 7


# What only a real broker can show


@pytest.mark.service
def test_a_frozen_broker_confirms_nothing_and_loses_nothing(data_folder: Path) -> None:
    """While it is frozen a bounded close says how many are unconfirmed; when it goes on they arrive, once."""
    with KafkaServer(data_folder) as server:
        bench = KafkaBench(server)
        topic = bench.topic()
        assert bench.publish(topic, numbered(5)).confirmed_rows == 5
        server.pause()
        receipts = bench.hand_over(topic, [Row(b"during%d" % n) for n in range(20)])
        assert bench.outlet.close(0.5) == 20
        assert receipts.told == 0
        server.resume()
        bench.until_told(receipts)
        assert receipts.confirmed_rows == 20
        assert bench.outlet.close(5.0) == 0
        assert [row.value for row in bench.held(topic)[5:]] == [b"during%d" % n for n in range(20)]


@pytest.mark.service
def test_a_full_client_queue_holds_back_and_loses_nothing(kafka_bench: KafkaBench) -> None:
    """More is handed over than the client holds: the rest follows in order, none is refused."""
    kafka_bench.outlet = kafka_bench.make(**{"queue.buffering.max.messages": 50})
    topic = kafka_bench.topic()
    rows = numbered(1000)
    told = [kafka_bench.hand_over(topic, rows[at : at + 100]) for at in range(0, 1000, 100)]
    assert kafka_bench.outlet.pending() == 1000
    kafka_bench.until_told(*told)
    assert sum(each.confirmed_rows for each in told) == 1000
    assert kafka_bench.held(topic) == rows


@pytest.mark.service
def test_a_group_that_meets_a_full_queue_is_answered_for_once(kafka_bench: KafkaBench) -> None:
    """What its topic refuses as a batch follows record by record, each once, however long it waited."""
    kafka_bench.outlet = kafka_bench.make(**{"queue.buffering.max.messages": 50, "linger.ms": 200})
    topic = kafka_bench.topic(max_bytes=3000)
    filler, rows = numbered(50), numbered(20, size=300)
    told = [kafka_bench.hand_over(topic, filler), kafka_bench.hand_over(topic, rows)]
    for _ in range(10):
        kafka_bench.outlet.poll(0.005)
    kafka_bench.until_told(*told)
    assert [each.confirmed_rows for each in told] == [50, 20]
    assert len(kafka_bench.held(topic)) == 70


@pytest.mark.service
def test_what_a_broker_did_not_take_in_time_is_refused_for_now(kafka: KafkaServer) -> None:
    """A broker that is away for longer than the client keeps records: each may pass later."""
    bench = KafkaBench(kafka)
    bench.config = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}
    bench.outlet = bench.make(**{"message.timeout.ms": 300})
    receipts = bench.publish("unreachable", numbered(20))
    assert {refusal.kind for refusal in receipts.refusals.values()} == {RefusalKind.LATER}
    assert bench.outlet.pending() == 0
