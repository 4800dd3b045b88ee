"""RabbitMQ and its workers are killed, blocked, cut off and deleted from: nothing lost, nothing invented."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet import Fleet
from tests.support.fleet_traffic import row_of, v2_body
from tests.support.rabbitmq_fleet import Queues, assert_right, codes, id_of, moody, rows, special
from tests.support.rabbitmq_load import Load, plain
from tests.support.scale import pick
from tests.support.servers import RabbitServer
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.fault]

Record = Any
"""``record_property`` of pytest: a figure for the summary of faults."""


@pytest.fixture
def node(data_folder: Path) -> Iterator[RabbitServer]:
    """A node that one test may kill."""
    with RabbitServer(data_folder / "node") as server:
        yield server


@contextlib.contextmanager
def fleet_on(folder: Path, server: RabbitServer, **rabbitmq: object) -> Iterator[tuple[Fleet, Queues]]:
    """A fleet with one checksum route on a node of its own; ``rabbitmq`` are settings of that section."""
    settings = {"rabbitmq": {"heartbeat_s": 2, **rabbitmq}, "worker": {"state": "state"}}
    with Fleet(folder, None, rabbitmq=server, settings=settings) as made:
        made.checksum(delay_ms=2)
        on = Queues(made, server, "sums")
        made.route("sums", **on.route_keys)
        yield made.prepare(), on


def test_workers_are_killed_under_load(
    rabbitmq: RabbitServer, tmp_path: Path, record_property: Record
) -> None:
    """F1: a worker dies in the middle of its work, again and again: 0 lost, copies are equal."""
    with fleet_on(tmp_path / "fleet", rabbitmq) as (fleet, on):
        workers = [fleet.worker("w-0"), fleet.worker("w-1")]
        with Load(lambda: plain(rabbitmq), on.source, on.key, rate=pick(200, 500)) as load:
            for kill in range(pick(3, 50)):
                load.wait_progress()
                victim = workers.pop(0)
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                workers.append(fleet.worker(victim.name))
                del kill
            judged = load.judged()
        record_property("F1 rabbitmq", f"{judged.sent} sent, 0 lost, {judged.duplicates} equal copies")
        on.wait_empty()


def test_a_drain_repeats_nothing(rabbitmq: RabbitServer, tmp_path: Path, record_property: Record) -> None:
    """F2: SIGTERM under load: the worker finishes, acknowledges, ends with 0; no request runs twice."""
    with fleet_on(tmp_path / "fleet", rabbitmq) as (fleet, on):
        leaving, staying = fleet.worker("w-0"), fleet.worker("w-1")
        with Load(lambda: plain(rabbitmq), on.source, on.key) as load:
            for _ in range(pick(2, 10)):
                load.wait_progress()
                started = time.monotonic()
                assert leaving.finish() == 0, leaving.log_tail()
                seconds = time.monotonic() - started
                load.wait_progress()
                leaving, staying = staying, fleet.worker(leaving.name)
            judged = load.judged()
        assert judged.duplicates == 0
        record_property("F2 rabbitmq", f"{judged.sent} sent, 0 lost, 0 copies, drain {seconds:.1f} s")
        on.wait_empty()


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_the_node_restarts(node: RabbitServer, tmp_path: Path, how: str, record_property: Record) -> None:
    """F18: killed or stopped under load, the node comes back with all it had confirmed; workers go on."""
    with fleet_on(tmp_path / "fleet", node) as (fleet, on):
        workers = [fleet.worker("w-0"), fleet.worker("w-1")]
        with Load(lambda: plain(node), on.source, on.key) as load:
            for _ in range(pick(1, 5)):
                load.wait_progress(200)
                node.kill() if how == "kill" else node.stop()
                node.start()
                back = time.monotonic()
                load.wait_progress(20)
                silent = time.monotonic() - back
            judged = load.judged()
        assert all(worker.running for worker in workers)
        assert silent <= 20
        record_property(
            f"F18 {how}",
            f"{judged.sent} sent, 0 lost, {judged.duplicates} equal copies, going on after {silent:.1f} s",
        )
        on.wait_empty()


@pytest.mark.parametrize("alarm", ["memory", "disk"])
def test_an_alarm_blocks_publishers(
    node: RabbitServer, tmp_path: Path, alarm: str, record_property: Record
) -> None:
    """F19: while the node takes no publishes nothing is acknowledged and nobody hangs; then it goes on."""
    with fleet_on(tmp_path / "fleet", node, publish_timeout_s=2) as (fleet, on):
        sent = rows("a", 300)
        on.send(sent)
        raise_alarm = node.set_memory_alarm if alarm == "memory" else node.set_disk_alarm
        raise_alarm(True)
        worker = fleet.worker()
        wait_until(lambda: "sums" in worker.status()["paused"], 60, "the route is paused")
        wait_until(lambda: on.messages() == len(sent), 20, "nothing is acknowledged", every_s=0.3)
        wait_until(lambda: worker.ask("/healthz")[0] == 200, 10, "the worker is alive")
        raise_alarm(False)
        cleared = time.monotonic()
        on.answers(1)
        seconds = time.monotonic() - cleared
        assert seconds <= 20
        on.wait_empty()
        outcomes = on.answers(on.server.depth(on.key), 30)
        assert {id_of(each) for each in outcomes} | {"a-1"} >= set(sent) - {"a-1"}
        record_property(f"F19 {alarm}", f"goes on {seconds:.1f} s after the alarm, 0 lost")


def test_the_consumer_timeout(data_folder: Path, tmp_path: Path, record_property: Record) -> None:
    """F20: a model slower than the node's patience: the message that comes again is acknowledged, not run."""
    limits = "{channel_tick_interval, 1000}"
    timeout_ms = pick(4_000, 60_000)
    node = RabbitServer(data_folder, config=[f"consumer_timeout = {timeout_ms}"], advanced=limits)
    settings = {"rabbitmq": {"heartbeat_s": 5}, "worker": {"state": "state"}}
    with node, Fleet(tmp_path / "fleet", None, rabbitmq=node, settings=settings) as fleet:
        moody(fleet, sleep_s=timeout_ms / 1000 * 1.5)
        on = Queues(fleet, node, "slow")
        fleet.route("slow", model="moody", **on.route_keys)
        fleet.prepare()
        worker = fleet.worker()
        sent = rows("s", 3)
        on.send(sent)
        outcomes = on.answers(len(sent), timeout_ms / 1000 * 6)
        copies = assert_right(sent, outcomes)
        on.wait_empty(60)
        runs = (fleet.folder / "runs.log").read_text().split()
        ran = [value for value in runs if value != "0"]
        assert len(ran) == len(sent)
        assert worker.metric("redeliveries_total", route="slow") >= len(sent)
        record_property("F20", f"{len(sent)} sent, each ran once, {copies} copies, the queue is empty")


def test_a_queue_is_deleted(node: RabbitServer, tmp_path: Path, record_property: Record) -> None:
    """F21: it is noticed, said, and taken from again when it is back."""
    with fleet_on(tmp_path / "fleet", node) as (fleet, on):
        worker = fleet.worker()
        first = rows("one", 20)
        on.send(first)
        assert_right(first, on.answers(20))
        on.wait_empty()
        node.delete_queue(on.source)
        worker.wait_event("queue_lost")
        on.server.declare(on.source)
        back = time.monotonic()
        second = rows("two", 20)
        on.send(second)
        assert_right(second, on.answers(20))
        seconds = time.monotonic() - back
        assert seconds <= 30
        record_property("F21", f"taken from again after {seconds:.1f} s")


def test_a_connection_dies_silently(node: RabbitServer, tmp_path: Path, record_property: Record) -> None:
    """F22: nothing is said and nothing arrives: the worker notices by itself and connects anew."""
    with (
        TcpProxy(node.port) as proxy,
        fleet_on(tmp_path / "fleet", node, url=proxy.url(node.url)) as (fleet, on),
    ):
        worker = fleet.worker()
        first = rows("one", 20)
        on.send(first)
        assert_right(first, on.answers(20))
        proxy.stall()
        dead = time.monotonic()
        second = rows("two", 20)
        on.send(second)
        worker.wait_event("rabbitmq_lost", 40)
        seconds = time.monotonic() - dead
        proxy.drop()
        proxy.resume()
        assert_right(second, on.answers(20))
        assert seconds <= 40
        record_property("F22", f"noticed after {seconds:.1f} s with a heartbeat of 2 s, 0 lost")


def test_a_result_exchange_is_away(node: RabbitServer, tmp_path: Path, record_property: Record) -> None:
    """F36: its route stops and says why, the other goes on; when it is back every request is answered."""
    settings = {"worker": {"state": "state"}}
    with Fleet(tmp_path / "fleet", None, rabbitmq=node, settings=settings) as fleet:
        fleet.checksum()
        broken, sound = Queues(fleet, node, "broken"), Queues(fleet, node, "sound")
        fleet.route("broken", **broken.route_keys)
        fleet.route("sound", **sound.route_keys)
        worker = fleet.prepare().worker()
        node.delete_exchange(broken.exchange)
        lost = rows("b", 50)
        broken.send(lost)
        wait_until(lambda: "broken" in worker.status()["paused"], 30, "the route is paused")
        assert broken.exchange in worker.status()["paused"]["broken"]
        fine = rows("s", 50)
        sound.send(fine)
        assert_right(fine, sound.answers(50))
        node.declare_exchange(broken.exchange)
        node.bind(broken.key, broken.exchange, broken.key)
        assert_right(lost, broken.answers(50))
        record_property("F36 rabbitmq", "one route paused, the other went on, 0 lost")


def test_the_dead_letter_queue_is_away(node: RabbitServer, tmp_path: Path, record_property: Record) -> None:
    """F38: the route stops and nothing is skipped; when the queue is back the letter is in it."""
    with fleet_on(tmp_path / "fleet", node) as (fleet, on):
        worker = fleet.worker()
        node.delete_queue(on.dead_letters)
        bad = {"bad-1": special(float("nan"))}
        on.send(bad)
        wait_until(lambda: "sums" in worker.status()["paused"], 30, "the route is paused")
        wait_until(lambda: on.messages() == 1, 30, "the request is not acknowledged", every_s=0.3)
        node.declare(on.dead_letters)
        (letter,) = on.letters(1)
        assert letter.headers["inferfleet-code"] == "E_DECODE"
        good = {"good-1": row_of(1)}
        on.send(good)
        assert codes(on.answers(2)) == {"bad-1": "E_DECODE", "good-1": ""}
        on.wait_empty()
        record_property("F38 rabbitmq", "1 letter, 0 lost, the route went on")


def test_a_right_is_revoked_live(node: RabbitServer, tmp_path: Path, record_property: Record) -> None:
    """F36: without the right to write its results a route stops and says why; the other goes on; then all."""
    url = node.add_user("worker", "secret", "", ".*", ".*")
    settings = {"worker": {"state": "state"}}
    with Fleet(tmp_path / "fleet", None, rabbitmq=node, settings=settings) as fleet:
        fleet.checksum()
        broken, sound = Queues(fleet, node, "broken"), Queues(fleet, node, "sound")
        fleet.route("broken", **broken.route_keys)
        fleet.route("sound", **sound.route_keys)
        fleet.prepare()
        worker = fleet.worker("w-1", INFERFLEET__RABBITMQ__URL=url)
        node.set_permissions("worker", "", rf"^(amq\.default|{sound.exchange})$", ".*")
        lost = rows("b", 20)
        broken.send(lost)
        wait_until(lambda: "broken" in worker.status()["paused"], 60, "the route is paused")
        assert broken.exchange in worker.status()["paused"]["broken"]
        fine = rows("s", 20)
        sound.send(fine)
        assert_right(fine, sound.answers(20))
        node.set_permissions("worker", "", ".*", ".*")
        assert_right(lost, broken.answers(20))
        record_property("F36 right revoked", "one route paused, the other went on, 0 lost")


def test_an_answer_that_is_too_large(rabbitmq: RabbitServer, tmp_path: Path, record_property: Record) -> None:
    """F37: one error and one dead letter; the answers beside it are given."""
    settings = {"limits": {"max_result_bytes": 4000}, "worker": {"state": "state"}}
    with Fleet(tmp_path / "fleet", None, rabbitmq=rabbitmq, settings=settings) as fleet:
        fleet.checksum()
        on = Queues(fleet, rabbitmq, "sums")
        fleet.route("sums", max_queue_delay_ms=200, **on.route_keys)
        with fleet.prepare().running():
            small = rows("s", 20)
            on.send(small)
            large = v2_body([row_of(n) for n in range(500)])
            rabbitmq.publish(on.source, large, message_id="large")
            outcomes = on.answers(21)
            assert codes(outcomes)["large"] == "E_RESULT_TOO_LARGE"
            assert_right(small, [each for each in outcomes if id_of(each) != "large"])
            (letter,) = on.letters(1)
            assert letter.body == large
            on.wait_empty()
        record_property("F37 rabbitmq", "1 error, 1 letter, 20 answers beside them")
