"""The control plane at work: routes applied by the command line to two real workers, under load."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferfleet.client import Client
from inferfleet.config import load
from tests.support.fleet import COMMAND, Fleet, WorkerProcess
from tests.support.fleet_traffic import OpenLoop, Reader, judge
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service
PARTITIONS = 2
RATE = 200.0
FOLLOW = {
    "INFERFLEET__ROUTES__SOURCE": "fleet",
    "INFERFLEET__REPORTS__HEARTBEAT_S": "0.2",
    "INFERFLEET__ROUTING__LEAD_MS": "1000",
}
BROKEN = "raise RuntimeError('the weights are corrupt')\n"


class Desk:
    """A fleet that follows the control plane, and its command line."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def run(self, *arguments: str, code: int = 0) -> str:
        done = self.fleet.run(*arguments, code=code, env=FOLLOW)
        return done.stdout if code == 0 else done.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def apply(self, version: str, *arguments: str, code: int = 0) -> str:
        self.fleet.routes["sums"]["version"] = version
        self.fleet.write_routes()
        return self.run("route", "apply", str(self.fleet.routes_file), *arguments, code=code)

    def run_any(self, *arguments: str) -> str:
        """Run to the end, whatever the exit code is."""
        running = self.start(*arguments)
        said, _ = running.communicate(timeout=60)
        return said

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [*COMMAND, "--config", str(self.fleet.config), *arguments]
        return subprocess.Popen(
            command,
            cwd=self.fleet.folder,
            env={**os.environ, **FOLLOW},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def file_of(self, version: str) -> str:
        """Write the route with a version into a file of its own."""
        self.fleet.routes["sums"]["version"] = version
        self.fleet.write_routes()
        copy = self.fleet.folder / f"routes-{version}.toml"
        copy.write_text(self.fleet.routes_file.read_text())
        return str(copy)

    def workers(self, *names: str) -> list[WorkerProcess]:
        found = [self.fleet.launch(name, env=FOLLOW) for name in names]
        return [each.wait_ready() for each in found]


@pytest.fixture
def desk(kafka: KafkaServer, redis_server: RedisServer, tmp_path: Path) -> Iterator[Desk]:
    """Route sums at version 1 is in the control plane; versions 1 and 2 are sound, 3 does not load."""
    with Fleet(tmp_path / "fleet", kafka, redis_server) as fleet:
        fleet.settings["worker"]["state"] = "state"
        fleet.checksum(version="1")
        fleet.checksum(version="2")
        fleet.handler(BROKEN, version="3")
        fleet.route(redis=True, partitions=PARTITIONS)
        fleet.prepare()
        made = Desk(fleet)
        assert "pool default has no live worker: its routes change at once" in made.apply("1")
        yield made


def test_blue_green_under_load_switches_at_one_instant_and_fails_nothing(
    desk: Desk, kafka: KafkaServer, record_property: Callable[[str, object], None]
) -> None:
    """No request fails; by its own time each is answered by the version of that time, by both workers."""
    fleet, client = desk.fleet, kafka.client_config()
    first, second = desk.workers("w-1", "w-2")
    with (
        Reader(client, fleet.results("sums")) as answers,
        Reader(client, fleet.source("sums")) as asked,
        OpenLoop(client, fleet.source("sums"), PARTITIONS, RATE) as load,
    ):
        load.wait_sent(int(RATE))
        said = desk.apply("2", "--reason", "blue/green")
        assert said.rstrip().endswith("acknowledged by 2 workers")
        load.wait_sent(int(4 * RATE))
        load.stop()
        answers.wait_ids(load.rows)
        asked.wait_ids(load.rows)
        verdict = judge(load.rows, answers, ("1", "2"))
        assert verdict.right, str(verdict)

        (newest,) = desk.json("route", "history", "sums", "--limit", "1")
        switch_ms = newest["effective_from_ms"]
        by_version = {"1": 0, "2": 0}
        wrong: list[str] = []
        for name in load.rows:
            version = answers.only(name).served["version"]
            by_version[version] += 1
            if version != ("2" if asked.only(name).timestamp_ms >= switch_ms else "1"):
                wrong.append(name)
        assert wrong == []
        assert min(by_version.values()) > RATE / 2
        servers = {answers.only(name).served["worker"] for name in load.rows}
        assert servers == {"w-1", "w-2"}
        record_property("blue_green", f"{verdict}; v1 {by_version['1']}, v2 {by_version['2']}, none amiss")
    assert (first.finish(), second.finish()) == (0, 0)


def test_a_version_that_does_not_load_is_refused_with_its_reason_and_the_old_serves_on(
    desk: Desk, kafka: KafkaServer
) -> None:
    """The announcement is withdrawn; requests go on under load; the log says what happened."""
    fleet, client = desk.fleet, kafka.client_config()
    workers = desk.workers("w-1", "w-2")
    with (
        Reader(client, fleet.results("sums")) as answers,
        OpenLoop(client, fleet.source("sums"), PARTITIONS, RATE) as load,
    ):
        load.wait_sent(int(RATE))
        said = desk.apply("3", "--reason", "no good", "--timeout", "60", code=1)
        assert "refuses sums:3:" in said
        assert "the weights are corrupt" in said
        assert "what stood serves on" in said
        load.wait_sent(int(RATE))
        load.stop()
        answers.wait_ids(load.rows)
        verdict = judge(load.rows, answers, ("1",))
        assert verdict.right, str(verdict)
    shown = desk.json("route", "show", "sums")
    assert shown["announced"] is None
    assert shown["in_force"]["action"] == "withdraw"
    assert shown["in_force"]["route"]["variants"][0]["version"] == "1"

    # The next change is not held up by what was refused before.
    assert "acknowledged by 2 workers" in desk.apply("2")
    assert [each.finish() for each in workers] == [0, 0]


def test_every_verb_works_on_routes_of_the_control_plane(desk: Desk, redis_server: RedisServer) -> None:
    """submit, result, status, topics, doctor, dlt, pause, audit, and the client of a program."""
    (worker,) = desk.workers("w-1")
    lines = [json.loads(line) for line in desk.run("submit", "sums", "--sample", "4", "--wait").splitlines()]
    assert [each["status"] for each in lines] == ["ok"] * 4
    assert lines[0]["id"] in desk.run("result", "sums", lines[0]["id"])
    status = desk.json("status")
    (registered,) = status["control"]["workers"]
    assert (registered["worker"], registered["behind"], registered["ready"]) == ("w-1", 0, ["sums:1"])
    assert f"{desk.fleet.name}.sums.requests" in desk.run("topics", "plan")
    findings = {each["name"]: each["verdict"] for each in desk.json("doctor", "--no-load")}
    assert (findings["routes"], findings["control"]) == ("ok", "ok")
    assert desk.json("dlt", "list", "sums") == []
    desk.run("route", "pause", "sums", "--reason", "tried", "--actor", "eva")
    wait_until(lambda: worker.status()["paused"], 20, "the route is paused")
    assert worker.status()["paused"] == {"sums": "tried (by eva)"}
    assert "paused: tried (by eva)" in desk.run("route", "show", "sums")
    desk.run("route", "resume", "sums")
    audited = desk.run("audit", "export")
    assert ('"route pause"' in audited, '"route resume"' in audited, '"eva"' in audited) == (True,) * 3
    desk.run("audit", "verify")
    assert desk.run("config", "check").endswith("the control plane: ok, 1 routes, revision 1\n")
    with Client(load(desk.fleet.config, FOLLOW)) as client:
        request = client.submit("sums", {"x": np.array([[1.0, 1.5, -1.0, 1.0]], np.float32)})
        assert client.result(request, 30).status == "ok"
    assert worker.finish() == 0


def test_an_audit_log_that_was_touched_in_redis_is_found(desk: Desk, redis_server: RedisServer) -> None:
    """By whoever verifies it: the first entry that does not fit is named."""
    desk.apply("2", "--reason", "second")
    said = desk.run("audit", "verify")
    assert said.startswith("ok: 2 entries, 1 to 2; ")
    file = desk.fleet.folder / "audit.jsonl"
    desk.run("audit", "export", "--output", str(file))
    assert desk.run("audit", "verify", str(file)) == said
    with redis_server.client() as redis:
        stream = f"{{{desk.fleet.name}}}:audit"
        (first, fields), *rest = redis.xrange(stream)
        redis.delete(stream)
        changed = {**fields, b"body": fields[b"body"].replace(b'"apply"', b'"revert"')}
        for entry, words in ((first, changed), *rest):
            redis.xadd(stream, words, id=entry)
    assert "entry 2 does not continue entry 1" in desk.run("audit", "verify", code=1)


def test_after_a_flush_only_a_reset_goes_on(desk: Desk, redis_server: RedisServer) -> None:
    """A plain apply is refused and names the workers; a reset is above what they hold, and they follow."""
    (worker,) = desk.workers("w-1")
    desk.apply("2")
    with redis_server.client() as redis:
        for key in redis.scan_iter(f"{{{desk.fleet.name}}}:*"):
            if b":workers:" not in key:
                redis.delete(key)
    said = desk.apply("1", code=1)
    assert "w-1 holds revision 3 of epoch 0: the store has lost revisions" in said
    assert "`route apply --reset FILE`" in said
    assert '"FAIL"' in desk.run_any("doctor", "--no-load", "--json")

    assert "revision 4 is in force" in desk.apply("1", "--reset", "--yes", "--reason", "Redis was flushed")
    wait_until(lambda: _registered(desk)["revision"] == 4, 20, "the worker follows the new log")
    wait_until(lambda: not _registered(desk)["stale"], 20, "its routes are not old")
    assert "acknowledged by 1 worker" in desk.apply("2")
    assert worker.finish() == 0


def test_a_log_whose_routes_are_gone_is_started_anew(desk: Desk, redis_server: RedisServer) -> None:
    """Half of it lost: every reader says so with the mend, and the mend works."""
    desk.apply("2")
    with redis_server.client() as redis:
        redis.delete(f"{{{desk.fleet.name}}}:routes")
    assert "inferfleet route apply --reset" in desk.apply("1", code=1)
    desk.apply("1", "--reset", "--yes")
    assert desk.json("route", "list")["epoch"] == 1
    assert desk.run("route", "list").count("1 100%") == 1


def test_of_two_applies_at_once_both_end_and_one_stands(desk: Desk) -> None:
    """One may be told of the conflict or replaced; the log has no gap, and the audit chain holds."""
    (worker,) = desk.workers("w-1")
    texts = [desk.file_of(version) for version in ("1", "2")]
    running = [desk.start("route", "apply", text, "--actor", f"a-{i}") for i, text in enumerate(texts)]
    for each in running:
        each.communicate(timeout=60)
    codes = [each.returncode for each in running]
    assert set(codes) <= {0, 1}
    assert 0 in codes
    shown = desk.json("route", "show", "sums")
    assert shown["announced"] is None
    numbers = [each["revision"] for each in desk.json("route", "history", "sums")]
    assert numbers == list(range(len(numbers), 0, -1))
    assert desk.run("audit", "verify").startswith("ok: ")
    assert worker.finish() == 0


def _registered(desk: Desk) -> Any:
    (found,) = desk.json("status")["control"]["workers"]
    return found
