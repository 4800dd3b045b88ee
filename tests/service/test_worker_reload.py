"""Routes and models change under a working fleet: loaded before anything switches, refused without harm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fleet import Fleet, WorkerProcess
from tests.support.fleet_traffic import OpenLoop, Reader, answered_since, judge, now_ms
from tests.support.servers import KafkaServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service

RATE = 100


@pytest.fixture
def fleet(kafka: KafkaServer, tmp_path: Path) -> Iterator[Fleet]:
    """One route on version 1 of the checksum model; another model stands by."""
    with Fleet(tmp_path, kafka) as made:
        made.checksum()
        made.checksum("more")
        made.route()
        yield made.prepare()


def answered_by(reader: Reader, load: OpenLoop, version: str) -> None:
    """Return once every partition was answered after now, and the newest answer names ``version``."""
    wait_until(answered_since(reader, load, now_ms()), 60, "every partition is answered")
    assert reader.outcomes[-1].served["version"] == version


@pytest.mark.slow
def test_versions_change_without_a_gap_and_bad_changes_change_nothing(
    fleet: Fleet, kafka: KafkaServer
) -> None:
    """An invalid file, a broken and a missing version change nothing; once there, it takes over."""
    client = kafka.client_config()
    route = fleet.routes["sums"]
    with (
        fleet.running() as worker,
        Reader(client, fleet.results("sums")) as reader,
        OpenLoop(client, fleet.source("sums"), 2, RATE) as load,
    ):
        revision = worker.status()["revision"]
        fleet.routes_file.write_text("[[route]]\nname = ")
        worker.wait_event("routes_refused")
        wait_until(lambda: worker.metric("routes_refused") == 1, 30, "the metrics say so")
        fleet.handler("raise RuntimeError('broken on purpose')", version="3")
        route["version"] = "3"
        fleet.write_routes()
        assert wait_until(lambda: _refusal(worker, "broken on purpose"), 30, "version 3 is refused")
        wait_until(lambda: worker.metric("model_refused", version="3") == 1, 30, "it is told of by itself")
        answered_by(reader, load, "1")
        assert worker.status()["revision"] == revision
        assert worker.ready

        route["version"] = "2"
        fleet.write_routes()
        assert wait_until(lambda: _refusal(worker, "no version '2'"), 30, "version 2 is not there yet")
        fleet.checksum(version="2")
        worker.wait_event("routes_adopted", revision=wait_revision(worker, revision))
        worker.wait_event("model_unloaded", version="1")
        answered_by(reader, load, "2")
        assert worker.status()["models"] == {"sums:2": "ready"}
        load.stop()
        reader.wait_ids(load.rows)
        verdict = judge(load.rows, reader, ("1", "2"))
        refusals = len(worker.events("model_refused"))

    print(f"\n{verdict}, {refusals} refusals")
    assert verdict.right, verdict
    assert verdict.duplicates == 0
    versions = [outcome.served["version"] for outcome in reader.outcomes]
    assert set(versions) == {"1", "2"}


def _refusal(worker: WorkerProcess, text: str) -> bool:
    return any(text in event["error"] for event in worker.events("model_refused"))


def wait_revision(worker: WorkerProcess, old: str) -> str:
    """Return the revision in force once it is another than ``old``."""

    def changed() -> str:
        found = str(worker.status()["revision"])
        return "" if found == old else found

    return wait_until(changed, 30, "another revision is in force")


def test_a_new_route_is_taken_up_and_an_old_one_let_go(fleet: Fleet, kafka: KafkaServer) -> None:
    """A route that is added while the worker runs is answered, without a restart, and removal ends it."""
    client = kafka.client_config()
    with fleet.running() as worker:
        old = fleet.routes.pop("sums")
        fleet.route("more", model="more", partitions=2)
        fleet.write_routes()
        fleet.kafka.create_topics({fleet.source("more"): 2, fleet.results("more"): 2})
        with (
            Reader(client, fleet.results("more")) as reader,
            OpenLoop(client, fleet.source("more"), 2, RATE) as load,
        ):
            wait_until(answered_since(reader, load, now_ms()), 60, "the new route is answered")
            load.stop()
            reader.wait_ids(load.rows)
            verdict = judge(load.rows, reader)
        wait_until(
            lambda: set(worker.status()["assignment"]) == {fleet.source("more")}, 30, "the old is let go"
        )
        assert worker.status()["models"] == {"more:1": "ready"}

    assert old["name"] == "sums"
    assert verdict.right, verdict
