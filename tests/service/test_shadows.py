"""Shadows on real servers: compared and told of, and nobody who waits for an answer can tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inferfleet.control.store import RedisControlStore
from inferfleet.core.shadow_comparing import merge
from inferfleet.plane import Draft
from inferfleet.redis_access import Place, open_redis
from inferfleet.routes import route_of
from inferfleet.summaries import Comparison, Window
from inferfleet.wire.stored import result_key
from inferfleet.worker.detached import HORIZON_S
from tests.support.control import change
from tests.support.fleet import Fleet
from tests.support.fleet_traffic import Reader, Sender, now_ms, row_of, v2_body
from tests.support.rabbitmq_fleet import Queues, rows
from tests.support.redis_server import RedisServer
from tests.support.servers import KafkaServer, RabbitServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service
FOLLOW = {"INFERFLEET__ROUTES__SOURCE": "fleet", "INFERFLEET__REPORTS__EVERY_S": "0.3"}
PATIENCE_S = 40.0
HANDLER = """
import time
import numpy as np

class Model:
    def load(self, folder, device, parameters):
        self.add = parameters.get("add", 0)
        self.sleep_s = parameters.get("sleep_s", 0)
        self.fails = parameters.get("fails", False)

    def predict(self, tensors):
        x = tensors["x"]
        time.sleep(self.sleep_s)
        if self.fails and x[:, 1].any():
            raise ValueError("no")
        first = x[:, 0].astype(np.int64)
        return {"check": np.stack([first % 7 + self.add, first], axis=1)}
"""


class Stand:
    """One route on version 1; version 2 is the same, 3 answers otherwise, 4 fails; windows are read back."""

    def __init__(self, fleet: Fleet, redis: RedisServer, kafka: KafkaServer) -> None:
        self.fleet = fleet
        where = Place(redis.url, timeout_s=2.0)
        self.redis = open_redis(where)
        self.store = RedisControlStore(
            lambda: open_redis(where), fleet.name, address=where.shown, utc_ms=now_ms
        )
        self.sender = Sender(kafka.client_config())
        self.reader = Reader(kafka.client_config(), fleet.results("sums"))
        self.sent: list[str] = []
        self.ready_ms = 0
        self._place = ""
        self._windows: list[Window] = []

    def apply(self, name: str) -> None:
        """Put a route into force."""
        route = route_of(self.fleet.routes[name], self.fleet.name, "test")
        self.store.commit(change(Draft(name, route, 0, "apply")))

    def send(self, count: int) -> None:
        """Send requests and return once they stand in the topic."""
        for _ in range(count):
            number = len(self.sent)
            self.sent.append(f"r-{number}")
            body = v2_body([row_of(number)])
            self.sender.send(self.fleet.source("sums"), body, id=self.sent[-1], key=b"k%d" % number)
        self.sender.flush()

    def windows(self, role: str) -> list[Window]:
        """Return all windows of the route so far."""
        found, self._place = self.store.windows("sums", self._place)
        self._windows += found
        return [each for each in self._windows if each.role == role]

    def compared(self, pairs: int) -> Comparison:
        """Return the sum of comparisons once there are so many pairs."""

        def total() -> Comparison:
            found = Comparison()
            for each in self.windows("shadow"):
                if each.comparison is not None:
                    found = merge(found, each.comparison)
            return found

        patience_s = HORIZON_S + PATIENCE_S  # a pair may stand in one part with a request that has no partner
        wait_until(lambda: total().pairs >= pairs, patience_s, f"{pairs} pairs are compared")
        return total()

    def judge(self) -> None:
        """Every request has one answer, its own, by version 1; and so it stands in Redis."""
        self.reader.wait_ids(self.sent)
        self.reader.pull()
        for number, name in enumerate(self.sent):
            outcome = self.reader.only(name)
            assert outcome.check == (number % 7, number)
            assert outcome.served["version"] == "1"
        keys = [result_key(self.fleet.name, "sums", name) for name in self.sent]
        assert all(body is not None and b'"model_version":"1"' in body for body in self.redis.mget(keys))

    def close(self) -> None:
        self.reader.__exit__(None, None, None)
        self.store.close()
        self.redis.close()


@pytest.fixture
def stand(kafka: KafkaServer, tmp_path: Path) -> Iterator[Stand]:
    """No worker runs yet."""
    with RedisServer(tmp_path / "redis") as redis, Fleet(tmp_path / "fleet", kafka, redis) as fleet:
        fleet.settings["worker"]["state"] = "state"
        versions: dict[str, dict[str, Any]] = {"1": {}, "2": {}, "3": {"add": 1}, "4": {"fails": True}}
        for version, parameters in versions.items():
            fleet.handler(HANDLER, version=version, **parameters)
        fleet.route(redis=True)
        fleet.prepare()
        made = Stand(fleet, redis, kafka)
        yield made
        made.close()


def _has_shadows(stand: Stand, versions: int) -> bool:
    """Return whether so many versions are loaded, and the routes were looked at since, as each second."""
    for report in stand.store.workers():
        if len(report.ready) == versions:
            stand.ready_ms = stand.ready_ms or report.at_ms
            return report.at_ms >= stand.ready_ms + 2_000
    return False


def test_shadows_in_a_worker_are_compared_and_not_seen(stand: Stand) -> None:
    """One that is the same, one that answers otherwise, one that fails: beside each other, on idle time."""
    stand.fleet.routes["sums"]["shadows"] = [
        {"name": "same", "version": "2", "secondary": 0.2},
        {"name": "other", "version": "3", "secondary": 0.0},
        {"name": "broken", "version": "4", "secondary": 0.0},
    ]
    stand.apply("sums")
    worker = stand.fleet.worker("w-1", **FOLLOW)
    wait_until(lambda: _has_shadows(stand, 4), PATIENCE_S, "every version is loaded and taken over")
    for _ in range(10):
        stand.send(40)
        stand.reader.wait_ids(stand.sent)
    stand.judge()

    def told(name: str) -> list[Window]:
        return [each for each in stand.windows("shadow") if each.variant == name]

    def settled(name: str) -> bool:
        return sum(each.requests + each.shed for each in told(name)) == 400

    for name in ("same", "other", "broken"):
        wait_until(lambda name=name: settled(name), PATIENCE_S, f"all is told of {name}")  # type: ignore[misc]
        assert sum(each.seen for each in told(name)) == 400
        assert sum(each.requests for each in told(name)) > 100
    same, other, noise = Comparison(), Comparison(), Comparison()
    for each in told("same"):
        same, noise = merge(same, each.comparison or same), merge(noise, each.secondary or noise)
    for each in told("other"):
        other = merge(other, each.comparison or other)
    assert same.identical == same.pairs > 0
    assert noise.identical == noise.pairs > 0
    assert other.different == other.label_changes == other.pairs > 0
    assert {code for each in told("broken") for code in each.codes} == {"E_MODEL"}
    wait_until(
        lambda: sum(each.requests for each in stand.windows("primary")) == 400, PATIENCE_S, "primary windows"
    )
    assert {code for each in stand.windows("primary") for code in each.codes} == {"ok"}
    assert worker.metric("shadow_requests_total", version="4", outcome="E_MODEL") > 100
    assert worker.finish() == 0


@pytest.mark.parametrize("heard_by", ["kafka", "redis"])
def test_a_detached_shadow_is_killed_and_lags_and_nobody_notices(stand: Stand, heard_by: str) -> None:
    """It joins by id with what stands in the topic or in Redis, in a group of its own, and writes nothing."""
    fleet = stand.fleet
    if heard_by == "redis":
        fleet.routes["sums"]["results"] = ["redis"]
    fleet.routes["shade"] = {
        "name": "shade",
        "source": f"kafka:{fleet.source('sums')}",
        "shadow_of": "sums",
        "model": "sums",
        "version": "3",
        "pool": "shade",
    }
    stand.apply("sums")
    stand.apply("shade")
    primary = fleet.worker("w-1", **FOLLOW)
    apart = {**FOLLOW, "INFERFLEET__WORKER__POOL": "shade", "INFERFLEET__KAFKA__START": "earliest"}
    shade = fleet.worker("s-1", **apart)
    if heard_by == "kafka":
        shade.wait_event("outcomes_followed")
    stand.send(200)
    found = stand.compared(200)
    assert found.different == found.pairs == 200
    shade.kill()
    stand.send(200)
    if heard_by == "kafka":
        stand.judge()
    again = fleet.worker("s-1", **apart)
    if heard_by == "kafka":
        again.wait_event("outcomes_followed")
    stand.send(200)
    found = stand.compared(400 if heard_by == "kafka" else 600)
    assert found.different == found.pairs
    if heard_by == "kafka":
        stand.judge()
        topics = set(stand.reader._consumer.list_topics(timeout=20).topics)
        assert not [name for name in topics if fleet.name in name and "shade" in name and "dlt" in name]
    keys = [result_key(fleet.name, "sums", name) for name in stand.sent]
    wait_until(lambda: all(stand.redis.mget(keys)), PATIENCE_S, "every answer stands in Redis")
    assert all(b'"model_version":"1"' in body for body in stand.redis.mget(keys))
    assert primary.metric("requests_total", outcome="ok") == 600
    assert [worker.finish() for worker in (primary, again)] == [0, 0]


def test_a_detached_shadow_on_rabbitmq_has_a_queue_of_its_own(
    rabbitmq: RabbitServer, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Both queues get every request; outcomes are looked up in Redis, and the shadow publishes nothing."""
    control = {"control": {"url": redis_server.url}, "reports": {"every_s": 0.3}}
    with Fleet(tmp_path / "fleet", None, redis_server, rabbitmq=rabbitmq, settings=control) as fleet:
        fleet.settings["worker"]["state"] = "state"
        fleet.handler(HANDLER, version="1")
        fleet.handler(HANDLER, version="3", add=1)
        fleet.route("sums", topic=False, redis=True)
        apart = f"{fleet.name}.shade.requests"
        fleet.routes["shade"] = {
            "name": "shade",
            "source": f"rabbitmq:{apart}",
            "shadow_of": "sums",
            "model": "sums",
            "version": "3",
            "pool": "shade",
        }
        fleet.prepare()
        workers = [fleet.worker("w-1"), fleet.worker("s-1", INFERFLEET__WORKER__POOL="shade")]
        sent = rows("r", 120)
        for queue in (Queues(fleet, rabbitmq, "sums"), Queues(fleet, rabbitmq, "shade")):
            queue.send(sent)
        where = Place(redis_server.url, timeout_s=2.0)
        store = RedisControlStore(lambda: open_redis(where), fleet.name, address=where.shown, utc_ms=now_ms)

        def told() -> Comparison:
            found = Comparison()
            for each in store.windows("sums")[0]:
                if each.role == "shadow" and each.comparison is not None:
                    found = merge(found, each.comparison)
            return found

        wait_until(lambda: told().pairs >= 120, PATIENCE_S, "every request is compared")
        assert told().different == told().pairs == 120
        store.close()
        Queues(fleet, rabbitmq, "shade").wait_empty()
        assert [worker.finish() for worker in workers] == [0, 0]
