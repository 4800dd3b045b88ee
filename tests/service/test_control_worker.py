"""A real worker whose routes come from the control plane's Redis: loaded ahead, switched by time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inferfleet.control.store import RedisControlStore
from inferfleet.plane import Draft, WorkerReport
from inferfleet.redis_access import Place, open_redis
from inferfleet.routes import Route, route_of
from tests.support.control import change
from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import Reader, Sender, now_ms, row_of, v2_body
from tests.support.redis_server import RedisServer
from tests.support.servers import KafkaServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service
FOLLOW = {"INFERFLEET__ROUTES__SOURCE": "fleet", "INFERFLEET__REPORTS__HEARTBEAT_S": "0.2"}
PATIENCE_S = 30.0


class Plane:
    """A fleet of one route on versions 1 and 2, a Redis of its own, and somebody who changes the routes."""

    def __init__(self, fleet: Fleet, redis: RedisServer, kafka: KafkaServer) -> None:
        self.fleet = fleet
        self.redis = redis
        where = Place(redis.url, timeout_s=2.0)
        self.store = RedisControlStore(
            lambda: open_redis(where), fleet.name, address=where.shown, utc_ms=now_ms
        )
        client = kafka.client_config()
        self.sender = Sender(client)
        self.reader = Reader(client, fleet.results("sums"))
        self._numbers = itertools.count()

    def route(self, version: str) -> Route:
        plain: dict[str, Any] = self.fleet.routes["sums"] | {"version": version}
        return route_of(plain, self.fleet.name, "test")

    def apply(self, version: str, effective_from_ms: int | None, **keys: Any) -> int:
        """Append a revision of the route and return its number."""
        draft = Draft("sums", self.route(version), effective_from_ms, "apply")
        return self.store.commit(change(draft, **keys))[0].number

    def report(self) -> WorkerReport | None:
        """Return what the only worker says of itself."""
        return next(iter(self.store.workers()), None)

    def ask(self) -> str:
        """Send a request, and return the version that answers it."""
        name = f"r-{next(self._numbers)}"
        self.sender.send(self.fleet.source("sums"), v2_body([row_of(1)]), id=name)
        self.sender.flush()
        self.reader.wait_ids([name])
        return self.reader.only(name).served["version"]

    def adopted(self, number: int) -> None:
        """Return once the worker has said that it has this revision's versions ready."""

        def found() -> bool:
            report = self.report()
            return report is not None and report.adopted.get("sums") == number

        wait_until(found, PATIENCE_S, f"revision {number} is adopted")

    def close(self) -> None:
        self.reader.__exit__(None, None, None)
        self.store.close()


@pytest.fixture
def plane(kafka: KafkaServer, tmp_path: Path) -> Iterator[Plane]:
    """No route is in the control plane yet."""
    with RedisServer(tmp_path / "redis") as redis, Fleet(tmp_path / "fleet", kafka) as fleet:
        fleet.settings["control"] = {"url": redis.url}
        fleet.settings["worker"]["state"] = "state"
        fleet.checksum(version="1")
        fleet.checksum(version="2")
        fleet.route()
        fleet.prepare()
        made = Plane(fleet, redis, kafka)
        yield made
        made.close()


def start(plane: Plane, name: str = "w-1") -> WorkerProcess:
    return plane.fleet.worker(name, **FOLLOW)


def test_a_worker_waits_for_its_first_route_and_follows_the_log(plane: Plane) -> None:
    """An announcement loads and routes nothing; its time switches; an abort goes back without waiting."""
    worker = plane.fleet.launch("w-1", env=FOLLOW)
    worker.wait_event("waiting_for_routes")
    plane.apply("1", 0)
    worker.wait_ready()
    assert plane.ask() == "1"
    announced = plane.apply("2", None)
    plane.adopted(announced)
    report = plane.report()
    assert report is not None
    assert set(report.ready) == {"sums:1", "sums:2"}
    assert plane.ask() == "1"
    began = now_ms()
    timed = plane.apply("2", began)
    plane.adopted(timed)
    assert plane.ask() == "2"
    plane.adopted(plane.apply("1", began))
    assert plane.ask() == "1"
    wait_until(lambda: plane.store.windows("sums")[0], PATIENCE_S, "summaries have arrived")
    assert worker.finish() == 0
    assert plane.store.workers() == []
    total = sum(window.requests for window in plane.store.windows("sums")[0])
    assert total == 4


def test_without_redis_a_worker_serves_on_and_a_restarted_one_goes_on_with_its_copy(plane: Plane) -> None:
    """Both say that the routes may be old; when Redis is back, they follow again."""
    plane.apply("1", 0)
    plane.apply("2", None)
    worker = start(plane)
    plane.adopted(2)
    plane.redis.kill()
    wait_until(lambda: "does not answer since" in worker.status()["stale"], PATIENCE_S, "it says so")
    assert worker.ready
    assert plane.ask() == "1"
    assert worker.finish() == 0
    again = start(plane)
    assert again.events("routes_from_disk")[0]["revision"] == 2
    assert plane.ask() == "1"
    plane.redis.start()
    wait_until(lambda: not again.status()["stale"], PATIENCE_S, "all is well")
    plane.adopted(plane.apply("2", now_ms()))
    assert plane.ask() == "2"
    assert again.finish() == 0


def test_a_store_that_lost_revisions_is_not_followed_until_a_person_resets_it(plane: Plane) -> None:
    """Flushed, then written anew: the worker keeps what it has, says so, also after a restart."""
    plane.apply("1", 0)
    worker = start(plane)
    plane.adopted(plane.apply("2", now_ms()))
    assert plane.ask() == "2"
    with plane.redis.client() as client:
        client.flushall()
    plane.apply("1", 0)
    wanted = "the store offers the older revision 1 while revision 2 is held; only a reset goes back"
    wait_until(lambda: worker.status()["stale"] == wanted, PATIENCE_S, "it says so")
    wait_until(lambda: (report := plane.report()) and report.stale == wanted, PATIENCE_S, "it reports so")
    assert plane.ask() == "2"
    assert worker.finish() == 0
    again = start(plane)
    wait_until(lambda: again.status()["stale"] == wanted, PATIENCE_S, "it says so again")
    assert plane.ask() == "2"
    plane.adopted(plane.apply("1", 0, reset=True))
    assert plane.ask() == "1"
    assert again.finish() == 0


def test_a_worker_with_a_file_of_routes_reports_too(plane: Plane) -> None:
    """Where the pool shares a Redis, people see every worker."""
    with plane.fleet.running():
        found = wait_until(plane.report, PATIENCE_S, "it has registered")
        wait_until(lambda: (report := plane.report()) and report.ready == ["sums:1"], PATIENCE_S, "it serves")
    assert (found.worker, found.pool) == ("w-1", "default")
    assert plane.report() is None


@pytest.mark.slow
def test_a_worker_that_finds_neither_redis_nor_a_copy_says_so(plane: Plane) -> None:
    """One line with the address, and no traceback."""
    plane.redis.kill()
    done = plane.fleet.run(
        "worker", "--wait", "5", code=1, env=FOLLOW | {"INFERFLEET__CONTROL__URL": plane.redis.url}
    )
    (line,) = done.errors
    assert f"redis at {plane.redis.url} does not answer since" in line
    assert "no copy of the routes" in line
