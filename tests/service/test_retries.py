"""Failures on both brokers: delayed attempts, the brake, and a request that ends the process."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from inferfleet.testing.checksum import expected_checksum
from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import Reader, Row, Sender, v2_body
from tests.support.rabbitmq_fleet import Queues, id_of, moody, rows, special
from tests.support.servers import KafkaServer, RabbitServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

DELAYS_MS = [400, 1500]
AWAY, NOT_YET, POISON, DEADLY = special(-666), special(-777), special(-999), special(-555)


class Side:
    """One broker as these tests see it: requests in, outcomes and dead letters out."""

    def __init__(self, fleet: Fleet, route: str) -> None:
        self.fleet = fleet
        self.route = route
        self.outcomes: dict[str, list[tuple[str, Any]]] = {}
        self.letters: dict[str, Mapping[str, Any]] = {}

    def send(self, sent: Mapping[str, Row]) -> None:
        raise NotImplementedError

    def look(self) -> None:
        raise NotImplementedError

    def left(self) -> int:
        """Return how many requests are in the source and not settled."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of clients."""

    def wait(self, ids: Mapping[str, Row], timeout_s: float = 60.0) -> None:
        """Return once every request has an outcome."""

        def all_ended() -> bool:
            self.look()
            return ids.keys() <= self.outcomes.keys()

        wait_until(all_ended, timeout_s, f"{len(ids)} requests have an outcome", every_s=0.05)

    def wait_letters(self, count: int) -> None:
        """Return once there are ``count`` dead letters."""

        def arrived() -> bool:
            self.look()
            return len(self.letters) >= count

        wait_until(arrived, 30, f"{count} dead letters arrive", every_s=0.05)

    def code(self, request_id: str) -> str:
        """Return the code of the one outcome of a request, empty for an answer."""
        ((code, _),) = self.outcomes[request_id]
        return code

    def assert_answered(self, sent: Mapping[str, Row]) -> None:
        """Each request has one answer, its own."""
        for name, row in sent.items():
            ((code, body),) = self.outcomes[name]
            assert code == "", (name, body)
            assert tuple(body["outputs"][0]["data"]) == expected_checksum("1", row)


class OnKafka(Side):
    def __init__(self, fleet: Fleet, route: str) -> None:
        super().__init__(fleet, route)
        client = fleet.kafka.client_config()
        self._sender = Sender(client)
        self._reader = Reader(client, fleet.results(route))
        self._dead = Reader(client, fleet.dead_letters(route))

    def send(self, sent: Mapping[str, Row]) -> None:
        for name, row in sent.items():
            self._sender.send(self.fleet.source(self.route), v2_body([row]), id=name, key=name.encode())
        self._sender.flush()

    def look(self) -> None:
        self._reader.pull()
        self._dead.pull()
        self.outcomes = {
            name: [(each.code, each.body) for each in copies] for name, copies in self._reader.by_id.items()
        }
        self.letters = {
            name: {key: value.decode() for key, value in copies[0].headers.items()}
            for name, copies in self._dead.by_id.items()
        }

    def left(self) -> int:
        worker = next(each for each in self.fleet.workers if each.running)
        return int(worker.metric("consumer_lag", route=self.route)) + int(
            worker.metric("in_flight_rows", route=self.route)
        )

    def close(self) -> None:
        self._reader.__exit__(None, None, None)
        self._dead.__exit__(None, None, None)


class OnRabbit(Side):
    def __init__(self, fleet: Fleet, route: str) -> None:
        super().__init__(fleet, route)
        self._on = Queues(fleet, fleet.rabbitmq, route)

    def send(self, sent: Mapping[str, Row]) -> None:
        self._on.send(sent)

    def look(self) -> None:
        server = self.fleet.rabbitmq
        while (found := server.get(self.fleet.results(self.route))) is not None:
            code = str(found.headers.get("inferfleet-code", ""))
            self.outcomes.setdefault(id_of(found), []).append((code, json.loads(found.body)))
        while (found := server.get(self.fleet.dead_letters(self.route))) is not None:
            self.letters[str(found.properties.message_id)] = found.headers

    def left(self) -> int:
        return self._on.messages()


@pytest.fixture(params=["kafka", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> str:
    """Each broker in turn."""
    return str(request.param)


@pytest.fixture
def fleet(
    broker: str,
    redis_server: RedisServer,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> Iterator[Fleet]:
    """A fleet with the moody model and short delays."""
    kafka: KafkaServer | None = request.getfixturevalue("kafka") if broker == "kafka" else None
    rabbit: RabbitServer | None = request.getfixturevalue("rabbitmq") if broker == "rabbitmq" else None
    settings = {"retry": {"delays_ms": DELAYS_MS}, "worker": {"state": "state"}}
    with Fleet(tmp_path / "fleet", kafka, redis_server, rabbitmq=rabbit, settings=settings) as made:
        moody(made)
        made.route("moody", model="moody", partitions=1, redis=True)
        yield made.prepare()


@pytest.fixture
def side(broker: str, fleet: Fleet) -> Iterator[Side]:
    made = OnKafka(fleet, "moody") if broker == "kafka" else OnRabbit(fleet, "moody")
    yield made
    made.close()


def test_what_may_pass_later_passes_later(fleet: Fleet, side: Side) -> None:
    """A timeout gets further attempts behind everybody else's back, and its answer in the end."""
    with fleet.running() as worker:
        late = {"late-1": AWAY}
        side.send(late)
        wait_until(lambda: worker.metric("retries_total", route="moody") >= 1, 30, "it waits for an attempt")
        (fleet.folder / "there").touch()
        others = rows("meanwhile", 40)
        side.send(others)
        side.wait({**others, **late})
        side.assert_answered({**others, **late})
        assert not side.letters
        wait_until(lambda: side.left() == 0, 30, "nothing is left", every_s=0.3)


def test_attempts_are_used_up(fleet: Fleet, side: Side) -> None:
    """After the last attempt there is one error and one dead letter that tells where it began."""
    with fleet.running() as worker:
        side.send({"never-1": AWAY})
        side.wait({"never-1": AWAY})
        side.wait_letters(1)
        assert side.code("never-1") == "E_MODEL"
        letter = side.letters["never-1"]
        assert letter["inferfleet-attempt"] == "3"
        assert letter["inferfleet-origin-topic"] == fleet.source("moody")
        assert letter["inferfleet-code"] == "E_MODEL"
        assert worker.metric("retries_total", route="moody") == 2


def test_a_brake_stops_the_route_and_resume_answers_all(fleet: Fleet, side: Side) -> None:
    """A model that fails on everything stops its route; mended and resumed, every request is answered."""
    (fleet.folder / "broken").touch()
    with fleet.running() as worker:
        sent = rows("b", 400)
        side.send(sent)
        wait_until(lambda: "moody" in worker.status()["paused"], 60, "the brake trips")
        reason = worker.status()["paused"]["moody"]
        assert "in a row failed" in reason
        side.look()
        moved = set(side.letters)
        assert len(moved) <= 20
        (fleet.folder / "broken").unlink()
        fleet.run("route", "resume", "moody")
        wait_until(lambda: "moody" not in worker.status()["paused"], 30, "the route goes on")
        side.wait(sent)
        side.look()
        assert set(side.letters) <= moved
        side.assert_answered({name: row for name, row in sent.items() if name not in moved})


def test_a_flood_of_bad_callers_trips_no_brake(fleet: Fleet, side: Side) -> None:
    """B32: what callers do wrong is theirs; good requests among it are answered and the route goes on."""
    with fleet.running() as worker:
        wrong = {f"w-{n}": (1.0, 2.0) for n in range(500)}
        good = rows("g", 500)
        mixed = {name: row for pair in zip(wrong.items(), good.items(), strict=True) for name, row in pair}
        side.send(mixed)
        side.wait(mixed)
        side.assert_answered(good)
        assert {side.code(name) for name in wrong} == {"E_SHAPE"}
        side.wait_letters(len(wrong))
        assert worker.status()["paused"] == {}


def test_a_request_that_ends_the_process_is_found(fleet: Fleet, side: Side) -> None:
    """Whoever starts the worker again needs patience, not hands: the one at fault gets E_MODEL."""
    good = rows("good", 100)
    deadly = {"deadly-1": DEADLY}
    crashes = 0
    worker: WorkerProcess = fleet.launch("w-1")
    worker.wait_ready()
    side.send({**good, **deadly})

    def supervised() -> bool:
        nonlocal worker, crashes
        if not worker.running:
            crashes += 1
            assert crashes < 8, worker.log_tail()
            worker = fleet.launch("w-1")
        side.look()
        return {*good, *deadly} <= side.outcomes.keys()

    wait_until(supervised, 120, "every request has an outcome", every_s=0.1)
    assert side.code("deadly-1") == "E_MODEL"
    assert crashes == 4
    for name, row in good.items():
        for code, body in side.outcomes[name]:
            assert code == ""
            assert tuple(body["outputs"][0]["data"]) == expected_checksum("1", row)
    side.wait_letters(1)
    assert set(side.letters) == {"deadly-1"}
    worker.wait_ready()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait() == 0


def test_until_idle_waits_for_what_comes_again(fleet: Fleet, side: Side) -> None:
    """A worker that ends when nothing is left to do waits for its own delayed attempts too."""
    sent = {**rows("i", 20), "never-2": AWAY}
    side.send(sent)
    worker = fleet.launch("w-1", "--until-idle", "1")
    assert worker.wait(60) == 0, worker.log_tail()
    side.wait(sent, 10)
    assert side.code("never-2") == "E_MODEL"
    side.wait_letters(1)
    assert side.letters["never-2"]["inferfleet-attempt"] == "3"
