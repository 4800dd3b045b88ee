"""Processes started before what they need: with ``--wait`` they say what is missing, and wait for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.fleet import COMMAND, Fleet
from tests.support.process import ServerProcess, logged_events
from tests.support.redis_server import RedisServer
from tests.support.servers import KafkaServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service


def test_a_worker_waits_for_redis_routes_topics_and_models_in_any_order(
    kafka: KafkaServer, tmp_path: Path
) -> None:
    """Nothing is there but Kafka; each thing that comes takes the worker a step further, and it serves."""
    late = RedisServer(tmp_path / "redis")
    with Fleet(tmp_path / "fleet", kafka, late) as fleet:
        fleet.settings["routes"] = {"source": "fleet"}
        fleet.settings["routing"] = {"lead_ms": 100}
        fleet.trust("sums")
        fleet.route()
        fleet.write()
        early = fleet.launch("early", "--wait", "120")
        assert "Connection refused" in early.wait_event("routes_away")["error"]
        with late:
            early.wait_event("routes_back")
            assert early.wait_event("waiting_for_routes")["pool"] == "default"
            early.wait_ready()  # there is nothing to serve yet, and nothing that it lacks
            fleet.checksum()
            fleet.settings["routes"] = {"source": "file:routes.toml"}
            fleet.write()
            fleet.create_topics()
            fleet.run("route", "apply", str(fleet.routes_file))
            wait_until(lambda: early.status()["models"], 60, "the worker serves what came")
            assert early.finish() == 0


def test_with_a_file_of_routes_topics_and_models_are_waited_for(kafka: KafkaServer, tmp_path: Path) -> None:
    """Each missing thing is one line of the log; without patience left it is the error."""
    with Fleet(tmp_path, kafka) as fleet:
        fleet.trust("sums")
        fleet.route()
        fleet.write()
        hasty = fleet.run("worker", "--wait", "1", code=1)
        assert f"topic {fleet.source('sums')} (source of route sums): does not exist" in hasty.errors[-1]

        patient = fleet.launch("patient", "--wait", "120")
        missing = patient.wait_event("waiting_for_topics")
        assert fleet.source("sums") in missing["error"]
        assert missing["seconds_left"] <= 120
        fleet.create_topics()
        assert "model 'sums' is not in the repository" in patient.wait_event("waiting_for_models")["error"]
        fleet.checksum()
        patient.wait_ready()
        assert patient.finish() == 0


def test_a_coordinator_waits_for_its_tokens(redis_server: RedisServer, tmp_path: Path) -> None:
    """Where tokens are made by another process, it may come first; it opens nothing before."""
    with Fleet(tmp_path, None, redis_server) as fleet:
        local = "127.0.0.1:0"
        fleet.settings["coordinator"] = {"address": local, "admin_address": local, "token_file": "tokens"}
        fleet.write()
        refused = fleet.run("coordinator", "--wait", "0", code=1)
        assert re.search(r"token_file .*tokens", refused.errors[-1]), refused.errors

        early = ServerProcess("coordinator", tmp_path / "coordinator.log")
        early.start([*COMMAND, "--config", str(fleet.config), "coordinator", "--wait", "60"], cwd=tmp_path)
        try:
            log = tmp_path / "coordinator.log"
            wait_until(lambda: logged_events(log, "waiting_for_tokens"), 60, "it waits for the tokens")
            assert not logged_events(log, "coordinator_started")
            fleet.run("coordinator", "token", "alice", "--role", "viewer")
            (started,) = wait_until(lambda: logged_events(log, "coordinator_started"), 60, "it starts")
            assert started["access"] == "token_file"
        finally:
            early.stop()
