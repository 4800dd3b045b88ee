"""What only RabbitMQ does to those who take from it: channels that close, queues that go, forged messages."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pika
import pytest

from inferfleet.addresses import plain
from inferfleet.brokers import rabbitmq_consumer
from inferfleet.brokers.rabbitmq_intake import RabbitIntake
from inferfleet.brokers.rabbitmq_link import RabbitLink, RabbitOptions
from inferfleet.brokers.rabbitmq_outlet import RabbitOutlet
from inferfleet.errors import Code
from inferfleet.ports import RefusalKind
from inferfleet.records import Envelopes, Stream
from inferfleet.wire.headers import read_headers
from tests.contract.intake_bench import Reader, Sent
from tests.contract.rabbitmq_bench import (
    RabbitBench,
    break_channel,
    deliver_frames,
    drop_connection,
    new_link,
    new_queue,
    put,
    queue_name,
    read_all,
)
from tests.support.certificates import write_certificates
from tests.support.process import free_ports
from tests.support.rabbitmq_server import RabbitServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

PATIENCE_S = 30.0


@pytest.fixture
def bench(rabbitmq: RabbitServer) -> Iterator[RabbitBench]:
    """The shared node, with queues of its own."""
    made = RabbitBench(rabbitmq)
    yield made
    made.close()


def numbered(count: int, stem: str = "v") -> list[Sent]:
    return [Sent(f"{stem}{n}".encode()) for n in range(count)]


def only(reader: Reader) -> Stream:
    """Return the one stream that the reader has."""
    (stream,) = reader.owned
    return stream


def link_of(bench: RabbitBench, reader: Reader) -> RabbitLink:
    return bench.links[id(reader.intake)]


def wait_taken(reader: Reader, count: int) -> None:
    def taken() -> bool:
        reader.turn()
        return len(reader.values()) >= count

    wait_until(taken, PATIENCE_S, f"{count} messages are taken", every_s=0.001)


# Tags and channels


def test_tags_of_a_channel_that_is_gone_acknowledge_nothing(bench: RabbitBench) -> None:
    """The number of its stream never comes again, so a late settle cannot be taken for another one's."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(5))
    reader = bench.join(topic)
    bench.until_taken(reader, 5)
    old = only(reader)
    break_channel(link_of(bench, reader))
    bench.until(lambda: reader.owned and old not in reader.owned, "another channel is open", reader)
    bench.until_taken(reader, 10)
    new = only(reader)
    assert new.partition > old.partition
    assert reader.heard("lost") == {old}
    assert all(
        each.redelivered for chunk in reader.chunks if chunk.stream == new for each in chunk.amqp or ()
    )
    reader.intake.settle({old: 6})
    reader.intake.settle({new: 3})
    bench.until_settled(topic, 2, reader)
    reader.intake.settle({new: 2})
    reader.intake.settle({new: 1})
    reader.intake.settle({new: 99})
    reader.intake.settle({new: 4})
    bench.until_settled(topic, 3, reader)
    assert only(reader) == new


def test_queues_are_acknowledged_each_for_itself(bench: RabbitBench) -> None:
    """Acknowledging all up to a tag is safe because a channel carries one queue."""
    one, other = bench.topic(), bench.topic()
    bench.send(one, 0, *numbered(5))
    bench.send(other, 0, *numbered(5))
    reader = bench.join(one, other)
    bench.until_taken(reader, 10)
    reader.intake.settle(bench.first(5, reader, one))
    bench.until_settled(one, 5, reader)
    assert bench.settled(other) == 0


def test_a_connection_that_breaks_is_replaced_and_nothing_is_lost(bench: RabbitBench) -> None:
    """What was not acknowledged comes again, on a channel with another number."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(5))
    reader = bench.join(topic)
    bench.until_taken(reader, 5)
    reader.intake.settle(bench.first(2, reader, topic))
    bench.until_settled(topic, 2, reader)
    old = only(reader)
    drop_connection(link_of(bench, reader))
    bench.until(lambda: old in reader.heard("lost"), "the loss is told", reader)
    bench.until_taken(reader, 8)
    assert sorted(v or b"" for v in reader.values()[5:]) == [b"v2", b"v3", b"v4"]


def test_the_next_address_is_tried_when_one_does_not_answer(rabbitmq: RabbitServer) -> None:
    """A node that is away holds up nobody for long."""
    link = new_link(rabbitmq, urls=("amqp://127.0.0.1:1/", rabbitmq.url))
    queue = queue_name()
    rabbitmq.declare(queue)
    put(rabbitmq, queue, numbered(1))
    reader = Reader()
    reader.intake = RabbitIntake(link, prefetch={})
    reader.intake.subscribe([f"rabbitmq:{queue}"], reader)
    wait_taken(reader, 1)
    reader.close()
    link.close()
    link.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "rabbitmq"]


def test_a_broker_that_no_longer_serves_is_noticed(
    bench: RabbitBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages wait, none arrives although there is room: the connection is built anew."""
    monkeypatch.setattr(rabbitmq_consumer, "STUCK_AFTER_S", 0.5)
    topic = bench.topic()
    reader = bench.join(topic)
    bench.until(lambda: reader.owned, "it consumes", reader)
    link = link_of(bench, reader)

    def cancel_unnoticed() -> None:
        assert link.taking.now is not None
        tag = rabbitmq_consumer.CONSUMER_TAG.encode()
        payload = struct.pack(">HHB", 60, 30, len(tag)) + tag + b"\x01"
        link.taking.now.tap.write(struct.pack(">BHI", 1, 1, len(payload)) + payload + b"\xce")

    link.call(cancel_unnoticed)
    bench.server.wait_depth(plain(topic), 0)
    bench.send(topic, 0, *numbered(3))
    bench.until_taken(reader, 3)
    assert link.taking.rebuilds == 1


# Holding and giving back


def test_what_is_paused_for_long_is_given_back_and_taken_again(rabbitmq: RabbitServer) -> None:
    """Half of the time that the broker allows; the member stays one."""
    queue = queue_name()
    rabbitmq.declare(queue)
    put(rabbitmq, queue, numbered(5))
    link = new_link(rabbitmq, consumer_timeout_s=1.0)
    reader = Reader()
    reader.intake = RabbitIntake(link, prefetch={})
    reader.intake.subscribe([f"rabbitmq:{queue}"], reader)
    wait_taken(reader, 5)
    held = only(reader)
    reader.intake.pause([held.source])

    def given_back() -> bool:
        reader.turn()
        return held in reader.heard("lost")

    wait_until(given_back, PATIENCE_S, "the loss is told")
    rabbitmq.wait_depth(queue, 5)
    assert reader.intake.joined
    assert not reader.owned
    assert not reader.intake.drained(5.0)
    reader.intake.resume([held.source])
    wait_taken(reader, 10)
    reader.close()
    link.close()


def test_no_more_is_read_ahead_than_there_is_room_for(rabbitmq: RabbitServer) -> None:
    """Large messages wait in the broker, whatever the prefetch; all are taken in the end."""
    queue = queue_name()
    rabbitmq.declare(queue)
    rabbitmq.publish(queue, *[b"x" * 100_000 for _ in range(60)])
    link = new_link(rabbitmq, buffer_bytes=500_000, heartbeat_s=1)
    reader = Reader()
    reader.intake = intake = RabbitIntake(link, prefetch=lambda _: 60)
    intake.subscribe([f"rabbitmq:{queue}"], reader)
    wait_until(lambda: link.taking.now is not None and link.taking.now.tap.held, PATIENCE_S, "it is full")
    until = time.monotonic() + 4.0  # longer than three heartbeats: nobody takes silence for death
    wait_until(lambda: time.monotonic() > until, 10.0, "the time is past")
    assert intake._held_bytes() < 2_000_000
    wait_taken(reader, 60)
    assert link.taking.rebuilds == 0
    assert not reader.heard("lost")
    reader.close()
    link.close()


def test_a_paused_queue_does_not_take_the_room_of_others(rabbitmq: RabbitServer) -> None:
    """What it has brought goes back, and the others go on."""
    paused, busy = queue_name(), queue_name()
    rabbitmq.declare(paused, busy)
    rabbitmq.publish(paused, *[b"x" * 100_000 for _ in range(20)])
    link = new_link(rabbitmq, buffer_bytes=500_000)
    reader = Reader()
    reader.intake = RabbitIntake(link, prefetch={f"rabbitmq:{paused}": 20})
    reader.intake.pause([f"rabbitmq:{paused}"])
    reader.intake.subscribe([f"rabbitmq:{paused}", f"rabbitmq:{busy}"], reader)
    rabbitmq.wait_depth(paused, 20)
    rabbitmq.publish(busy, *[b"y" for _ in range(50)])
    wait_taken(reader, 50)
    reader.intake.resume([f"rabbitmq:{paused}"])
    wait_taken(reader, 70)
    reader.close()
    link.close()


# Queues and rights


def test_a_queue_that_goes_is_told_and_taken_from_when_it_is_back(bench: RabbitBench) -> None:
    """The text names the queue and the mend; other queues go on meanwhile."""
    topic, other = bench.topic(), bench.topic()
    reader = bench.join(topic, other)
    bench.until(lambda: len(reader.owned) == 2, "both are consumed from", reader)
    bench.server.delete_queue(plain(topic))
    bench.until(lambda: bench.owned(reader) == {(other, 0)}, "the loss is told", reader)
    bench.until(lambda: reader.intake.denied is not None, "it is said why", reader)
    assert plain(topic) in reader.intake.denied
    assert "`inferfleet topics plan`" in reader.intake.denied
    assert not reader.intake.joined
    bench.send(other, 0, Sent(b"meanwhile"))
    bench.until(lambda: reader.values(other), "the other queue goes on", reader)
    bench.server.declare(plain(topic))
    bench.send(topic, 0, *numbered(3))
    bench.until(lambda: len(reader.values(topic)) == 3, "it is taken from again", reader)
    assert reader.intake.denied is None
    assert reader.intake.joined


def test_whoever_may_not_take_is_told_why(rabbitmq: RabbitServer) -> None:
    """No right to read, and a wrong password: one line each, and when it is mended it works."""
    queue, user = queue_name(), queue_name("user")
    rabbitmq.declare(queue)
    put(rabbitmq, queue, numbered(1))
    password = "wrong"
    url = rabbitmq.add_user(user, "right").replace("right", "")
    link = new_link(rabbitmq, urls=(url,), credentials=lambda: ("", password))
    reader = Reader()
    reader.intake = RabbitIntake(link, prefetch={})
    reader.intake.subscribe([f"rabbitmq:{queue}"], reader)
    denied = wait_until(lambda: reader.intake.denied, PATIENCE_S, "the login is refused")
    assert "check username and password under [rabbitmq]" in denied
    assert "right" not in denied
    password = "right"
    denied = wait_until(
        lambda: (text := reader.intake.denied) and queue in text and text, PATIENCE_S, "the queue is refused"
    )
    assert "ACCESS_REFUSED" in denied
    assert "`inferfleet topics plan`" in denied
    rabbitmq.set_permissions(user, read=".*")
    wait_taken(reader, 1)
    assert reader.intake.denied is None
    reader.close()
    link.close()


# What senders can do


def raw_message(reader: Reader, link: RabbitLink, header: bytes, *bodies: bytes) -> None:
    """Let a delivery arrive that no client library would send."""
    tag = max((p for chunk in reader.chunks for p in chunk.positions), default=0) + 1

    def arrive() -> None:
        assert link.taking.now is not None
        link.taking.now.tap.data_received(deliver_frames(1, tag, header, *bodies))

    link.call(arrive)


def test_forged_messages_are_taken_and_refused_by_their_headers(bench: RabbitBench) -> None:
    """Nested tables under our names, depth without end, texts that are none: the connection stays."""
    topic = bench.topic()
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"a": deep}
    with bench.server.channel() as channel:
        for headers in (
            {"inferfleet-id": {"a": 1}},
            {"inferfleet-deadline-ms": [1, 2]},
            {"x": deep, "inferfleet-priority": deep},
            {"harmless": deep},
        ):
            properties = pika.BasicProperties(headers=headers, priority=255, delivery_mode=2)
            channel.basic_publish("", plain(topic), b"{}", properties)
    reader = bench.join(topic)
    bench.until_taken(reader, 4)
    link = link_of(bench, reader)
    raw_message(reader, link, b"\x80\x00\x02\xff\xfe", b"no text")
    bench.until_taken(reader, 5)
    raw_message(reader, link, b"\x20\x00\x00\x00\x00\x05\x04name", b"no table")
    bench.until_taken(reader, 6)
    nested = b""
    for _ in range(9_000):
        nested = b"\x01aF" + struct.pack(">I", len(nested)) + nested
    raw_message(reader, link, b"\x20\x00" + struct.pack(">I", len(nested)) + nested, b"deep")
    bench.until_taken(reader, 7)
    meta = read_headers([headers for chunk in reader.chunks for headers in chunk.headers])
    codes = {row: error.code for row, error in meta.rejected.items()}
    assert codes == {
        0: Code.ID,
        1: Code.HEADER,
        2: Code.HEADER,
        4: Code.CONTENT_TYPE,
        5: Code.HEADER,
    }
    assert not reader.heard("lost")
    assert link.taking.rebuilds == 0


def test_a_body_of_twenty_megabytes_is_cut_and_nothing_else_suffers(rabbitmq: RabbitServer) -> None:
    """No more of it is kept than shows that it is too large, and the next message is whole."""
    queue = queue_name()
    rabbitmq.declare(queue)
    rabbitmq.publish(queue, b"before", b"x" * 20_000_000, b"after")
    link = new_link(rabbitmq, max_body_bytes=1_000_000)
    reader = Reader()
    reader.intake = RabbitIntake(link, prefetch={})
    reader.intake.subscribe([f"rabbitmq:{queue}"], reader)
    wait_taken(reader, 3)
    assert [len(value or b"") for value in reader.values()] == [6, 1_000_000, 5]
    marks = [headers for chunk in reader.chunks for headers in chunk.headers]
    assert marks[1] == [("inferfleet-cut", b"body")]
    reader.intake.settle({only(reader): 4})
    wait_until(lambda: reader.intake.drained(5.0), PATIENCE_S, "all is settled")
    reader.close()
    link.close()


# Drained, and many


def test_drained_looks_at_the_delay_queues_as_well(rabbitmq: RabbitServer) -> None:
    """A message that waits for another attempt is work to come; a queue that is not there holds none."""
    queue = queue_name()
    delay = f"{queue}.retry.5000"
    rabbitmq.declare(queue, delay)
    rabbitmq.publish(delay, b"waits")
    link = new_link(rabbitmq)
    source = f"rabbitmq:{queue}"
    reader = Reader()
    reader.intake = RabbitIntake(
        link, prefetch={}, delays={source: [f"rabbitmq:/{delay}", f"rabbitmq:/{queue}.retry.30000"]}
    )
    reader.intake.subscribe([source], reader)
    wait_until(lambda: reader.turn() or reader.intake.joined, PATIENCE_S, "it consumes")
    assert not reader.intake.drained(5.0)
    assert rabbitmq.get(delay) is not None
    assert reader.intake.drained(5.0)
    reader.close()
    link.close()
    assert not reader.intake.drained(1.0)


class Counting:
    """A receipt that counts."""

    def __init__(self) -> None:
        self.confirmed_rows = 0
        self.refusals: list[Any] = []

    def confirmed(self, count: int) -> None:
        self.confirmed_rows += count

    def refused(self, index: int, refusal: Any) -> None:
        self.refusals.append((index, refusal))


def plain_loop() -> Any:
    """Return the event loop of the standard library, where another one is installed, too."""
    import asyncio

    return asyncio.new_event_loop()


@pytest.mark.parametrize("new_loop", [None, plain_loop], ids=["fast", "plain"])
def test_ten_thousand_messages_through_two_members_and_a_lost_connection(
    rabbitmq: RabbitServer, new_loop: Callable[[], Any] | None
) -> None:
    """Each arrives, those that were out when the connection broke perhaps twice, and none is left."""
    queue, count = queue_name(), 10_000
    rabbitmq.declare(queue)
    source = f"rabbitmq:{queue}"
    options = RabbitOptions(urls=(rabbitmq.url,), client_name="tests")
    links = [RabbitLink(options, new_loop=new_loop) for _ in range(2)]
    outlet, receipt = RabbitOutlet(links[0]), Counting()
    for at in range(0, count, 500):
        values = [b"%d" % n for n in range(at, at + 500)]
        outlet.publish(Envelopes(f"rabbitmq:/{queue}", [None] * 500, values, [[]] * 500), receipt)
    assert outlet.close(PATIENCE_S) == 0
    assert (receipt.confirmed_rows, receipt.refusals) == (count, [])
    readers = []
    for link in links:
        reader = Reader()
        reader.intake = RabbitIntake(link, prefetch=lambda _: 300)
        reader.intake.subscribe([source], reader)
        readers.append(reader)
    seen: set[bytes | None] = set()
    broken = False

    def all_seen() -> bool:
        nonlocal broken
        for reader in readers:
            for chunk in reader.turn(max_wait_s=0.002):
                seen.update(chunk.values)
                reader.intake.settle({chunk.stream: chunk.positions[-1] + 1})
        if not broken and len(seen) > count / 3:
            broken = True
            drop_connection(links[1])
        return len(seen) == count

    wait_until(all_seen, PATIENCE_S, f"{count} messages are seen", every_s=0.0)
    assert all(reader.values() for reader in readers)
    wait_until(
        lambda: not any(reader.turn() for reader in readers) and readers[0].intake.drained(5.0),
        PATIENCE_S,
        "nothing is left",
    )
    assert sum(len(reader.values()) for reader in readers) <= count + 900
    for reader, link in zip(readers, links, strict=True):
        reader.close()
        link.close()
    assert rabbitmq.depth(queue) == 0


def with_tls(folder: Path, port: int) -> tuple[list[str], str]:
    """Return the node's lines for a listener with TLS, and the authority that signs for it."""
    files = write_certificates(folder)
    return [
        f"listeners.ssl.1 = 127.0.0.1:{port}",
        f"ssl_options.cacertfile = {files.authority}",
        f"ssl_options.certfile = {files.chain}",
        f"ssl_options.keyfile = {files.key}",
        "ssl_options.verify = verify_none",
    ], str(files.authority)


def test_a_node_that_is_frozen_or_killed_is_used_again(data_folder: Path, tmp_path: Path) -> None:
    """Silence is noticed by heartbeats. After a kill everything unacknowledged comes again, and is confirmed
    or refused what was out; what was confirmed before is there. All of it by TLS.
    """
    (port,) = free_ports(1)
    config, authority = with_tls(tmp_path / "tls", port)
    url = f"amqps://guest:guest@127.0.0.1:{port}/"
    with RabbitServer(data_folder, config=config) as server:
        bench = RabbitBench(server)
        topic = bench.topic()
        bench.send(topic, 0, *numbered(6))
        stranger = new_link(server, urls=(url,))
        stranger.call(stranger.open, stranger.taking)
        denied = wait_until(lambda: stranger.taking.denied, PATIENCE_S, "a strange authority is refused")
        assert "ca_file" in denied
        stranger.close()
        link = new_link(server, urls=(url,), ca_file=authority, heartbeat_s=1)
        reader = Reader()
        reader.intake = RabbitIntake(link, prefetch={})
        reader.intake.subscribe([topic], reader)
        wait_taken(reader, 6)
        frozen = only(reader)
        server.pause()

        def lost() -> bool:
            reader.turn()
            return frozen in reader.heard("lost")

        began = time.monotonic()
        wait_until(lost, PATIENCE_S, "the silence is noticed")
        assert time.monotonic() - began < 6.0
        server.resume()
        wait_taken(reader, 12)
        reader.intake.settle({only(reader): 3})
        wait_until(lambda: reader.turn() or bench.settled(topic) == 2, PATIENCE_S, "two are settled")
        outlet, receipt = RabbitOutlet(link), Counting()
        results = new_queue(server)
        for n in range(20):
            bodies = [b"%d.%d" % (n, m) for m in range(100)]
            outlet.publish(Envelopes(results, [None] * 100, bodies, [[]] * 100), receipt)

        def some_confirmed() -> bool:
            outlet.poll(0.001)
            return receipt.confirmed_rows > 0

        wait_until(some_confirmed, PATIENCE_S, "some are confirmed", every_s=0.0)
        before = receipt.confirmed_rows
        server.kill()
        server.start()
        wait_taken(reader, 16)
        assert sorted(v or b"" for v in reader.values()[12:]) == [b"v2", b"v3", b"v4", b"v5"]
        assert outlet.close(PATIENCE_S) == 0
        assert receipt.confirmed_rows + len(receipt.refusals) == 2000
        assert {refusal.kind for _, refusal in receipt.refusals} <= {RefusalKind.LATER}
        there = {body for _, _, body in read_all(server, results, [])}
        assert len(there) >= receipt.confirmed_rows >= before
        reader.close()
        link.close()
