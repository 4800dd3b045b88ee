"""``inferfleet demo`` from end to end: real workers, every broker, one kill, nothing lost, and rollouts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest
import redis

from inferfleet.demo.processes import birth, recorded, stop_recorded
from tests.support import programs
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.slow, pytest.mark.timeout(420)]
LIMIT_S = 300.0
DEMO = [sys.executable, "-m", "inferfleet.cli", "demo"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where one demo runs; what it might leave running is ended."""
    yield tmp_path
    stop_recorded(tmp_path / ".demo" / "pids.json")


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the demo to its end in ``folder``."""
    return subprocess.run(
        [*DEMO, *arguments], cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def said(output: str, name: str) -> str:
    """What the last table says beside a name."""
    found = re.search(rf"{name} │ (.*?) *│", output)
    assert found is not None, output
    return found[1]


def assert_that_nothing_was_lost(shown: subprocess.CompletedProcess[str]) -> None:
    """The last table says that every request has its right answer."""
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert said(shown.stdout, "sent") == "2037"
    assert said(shown.stdout, "answered") == "2037, of these 2037 also in Redis"
    assert said(shown.stdout, "lost") == "0"
    assert said(shown.stdout, "errors, wrong answers") == "0, 0"
    assert "by SIGKILL" in shown.stdout


def assert_that_the_better_version_won(shown: subprocess.CompletedProcess[str]) -> None:
    """Version 2 answers the live route, and 3 was found out, first as a shadow and then by its labels."""
    ends = {
        title: re.search(rf"│ {title} +│ (\w+) +│ [\d.]+ s +│ (.*?) *│", shown.stdout)
        for title in ("2", "3 shadow", "3 canary")
    }
    assert {title: found and found[1] for title, found in ends.items()} == {
        "2": "done",
        "3 shadow": "aborted",
        "3 canary": "aborted",
    }, shown.stdout
    assert ends["3 shadow"] is not None
    assert ends["3 shadow"][2].startswith("comparison: block")
    assert ends["3 canary"] is not None
    assert ends["3 canary"][2].startswith("metric correct: ")
    assert re.fullmatch(r"\d+ sent, 0 lost, 0 errors", said(shown.stdout, "live requests"))


def test_every_request_is_answered_although_a_worker_is_killed(folder: Path) -> None:
    """All digits and files get their right answer, and what was kept runs on until ``--stop``."""
    shown = demo(folder, "--keep")

    assert_that_nothing_was_lost(shown)
    assert_that_the_better_version_won(shown)
    record = folder / ".demo" / "pids.json"
    running = recorded(record)
    assert [each.name.partition("-")[0] for each in running] == [
        "broker", "redis", "worker", "worker", "coordinator",
    ]  # fmt: skip
    settings = tomllib.loads((folder / ".demo" / "fleet.toml").read_text())
    with redis.Redis.from_url(settings["redis"]["url"]) as client:
        answer = json.loads(client.get("inferfleet:result:digits:digit-42") or "{}")
    assert answer["id"] == "digit-42"
    assert answer["model_version"] in {"1", "2"}
    assert settings["routes"]["source"] == "fleet"
    with urllib.request.urlopen(f"http://{settings['coordinator']['address']}/v1/routes/live") as told:
        live = json.loads(told.read())
    assert [each["version"] for each in live["standing"]["route"]["variants"]] == ["2"]

    refused = demo(folder)
    assert refused.returncode == 1
    assert "end it with `inferfleet demo --stop`" in refused.stderr

    stopped = demo(folder, "--stop")
    assert stopped.returncode == 0
    assert all(birth(each.pid) is None for each in running)


def test_on_rabbitmq_it_is_the_same_and_a_plain_client_is_answered_by_what_was_kept(folder: Path) -> None:
    """The node is the demo's own; a message that knows nothing of inferfleet has its answer in the queue."""
    programs.rabbitmq_server()
    shown = demo(folder, "--broker", "rabbitmq", "--keep")

    assert_that_nothing_was_lost(shown)
    running = recorded(folder / ".demo" / "pids.json")
    assert [each.name.partition("-")[0] for each in running] == [
        "epmd", "rabbitmq", "redis", "worker", "worker",
    ]  # fmt: skip
    settings = tomllib.loads((folder / ".demo" / "fleet.toml").read_text())
    with pika.BlockingConnection(pika.URLParameters(settings["rabbitmq"]["url"])) as connection:
        channel = connection.channel()
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 64], "data": [0.0] * 64}
        channel.basic_publish("", "digits.requests", json.dumps({"id": "mine", "inputs": [tensor]}).encode())
        _, _, body = wait_until(
            lambda: got if (got := channel.basic_get("digits.results", auto_ack=True))[0] else None,
            LIMIT_S,
            "the answer is in the queue",
        )
    assert json.loads(body)["id"] == "mine"

    stopped = demo(folder, "--stop")
    assert stopped.returncode == 0
    assert all(birth(each.pid) is None for each in running)


def test_an_interrupted_demo_leaves_nothing_running(folder: Path) -> None:
    """Ctrl-C and SIGTERM end servers and workers too, at any moment."""
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(
            DEMO, cwd=folder, stdout=out, stderr=out, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
    record = folder / ".demo" / "pids.json"
    running = wait_until(
        lambda: found if len(found := recorded(record)) >= 3 else [], LIMIT_S, "a worker was started"
    )

    process.send_signal(signal.SIGTERM)

    assert process.wait(LIMIT_S) != 0
    assert all(birth(each.pid) is None for each in running)
    assert not record.exists()
