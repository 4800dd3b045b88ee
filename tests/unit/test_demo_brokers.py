"""The demo's brokers: settings and routes that workers understand; RabbitMQ found, installed, or missed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from inferfleet import config
from inferfleet.demo import rabbitmq_node, sentences
from inferfleet.demo.broker import Broker
from inferfleet.demo.kafka import KafkaBroker
from inferfleet.demo.processes import DemoError
from inferfleet.demo.rabbitmq import RabbitBroker
from inferfleet.demo.rabbitmq_node import MISSING, Node, Programs, programs
from inferfleet.demo.rabbitmq_wires import plain_headers
from inferfleet.demo.report import hints
from inferfleet.demo.servers import free_ports
from inferfleet.demo.stage import FLEET, GROUP, Stage
from inferfleet.naming import source_address
from inferfleet.routes import load_routes

PROGRAMS = Programs("rabbitmq-server", "rabbitmqctl", "epmd")
RABBITMQ = RabbitBroker(Node(5673, PROGRAMS, {}))
EMBEDDED = KafkaBroker("127.0.0.1:9093", GROUP, embedded=True)
REAL = KafkaBroker("127.0.0.1:9093", GROUP, embedded=False)
BROKERS = pytest.mark.parametrize("broker", [EMBEDDED, REAL, RABBITMQ], ids=["embedded", "real", "rabbitmq"])


@BROKERS
def test_settings_and_routes_are_those_of_the_broker(broker: Broker, tmp_path: Path) -> None:
    """What the demo writes loads, names the broker's address, and takes from it and answers to it."""
    stage = Stage(tmp_path, ("digits", "files", sentences.ROUTE))
    stage.write_settings(broker, 6380)

    settings = config.load(stage.fleet_toml, {})
    routes = load_routes(tmp_path / "routes.toml", FLEET).routes

    rabbitmq = broker is RABBITMQ
    kind = "rabbitmq" if rabbitmq else "kafka"
    assert settings.group == GROUP
    assert settings.redis.url == "redis://127.0.0.1:6380/0"
    assert settings.models.trusted == (sentences.MODEL,)
    if rabbitmq:
        assert settings.rabbitmq.url == "amqp://127.0.0.1:5673"
    else:
        assert settings.kafka.bootstrap_servers == "127.0.0.1:9093"
    assert bool(settings.kafka.consumer) == (broker is EMBEDDED)
    assert [route.name for route in routes] == ["digits", "files", "sentences"]
    for route in routes:
        assert source_address(route) == ("rabbitmq:" if rabbitmq else "") + f"{route.name}.requests"
        assert {each.kind for each in route.results} == {kind, "redis"}
    assert [variant.weight for variant in routes[0].variants] == [50, 50]


@BROKERS
def test_what_is_kept_is_told_with_commands_that_name_its_addresses(broker: Broker, tmp_path: Path) -> None:
    """A person copies lines; none has a gap to fill."""
    shown = hints(Stage(tmp_path, ("digits",)), broker, 6380, ["127.0.0.1:8471"], kept=True)

    asked = next(line for line in shown.splitlines() if '"id":"mine"' in line)
    tool, address = ("amqp-publish", "amqp://127.0.0.1:5673") if broker is RABBITMQ else ("kcat", ":9093")
    assert tool in shown
    assert address in shown
    assert asked.count("'") == 2
    assert "redis-cli -p 6380 GET inferfleet:result:digits:mine" in shown
    assert "status --admin 127.0.0.1:8471" in shown
    assert "--stop" in shown


def test_free_ports_are_different() -> None:
    """A server that needs three ports gets three."""
    assert len(set(free_ports(20))) == 20


def test_a_header_table_reads_like_kafkas_headers() -> None:
    """Texts and bytes become bytes; what no header of ours is stays out."""
    table = {"inferfleet-id": "digit-1", "raw": b"\x00\xff", "count": 3, "nested": {"a": 1}}

    assert plain_headers(table) == {"inferfleet-id": b"digit-1", "raw": b"\x00\xff"}


def test_where_rabbitmq_is_missing_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may not install is told the command of their system, not a traceback."""
    monkeypatch.setattr(rabbitmq_node, "find_programs", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(DemoError) as refused:
        programs(lambda _: None)

    assert str(refused.value) == MISSING
    assert "\n" not in MISSING
    for how in ("apt-get install rabbitmq-server", "dnf install rabbitmq-server", "brew install rabbitmq"):
        assert how in MISSING


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the file that keeps packages from starting services."""
    path = tmp_path / "policy-rc.d"
    monkeypatch.setattr(rabbitmq_node, "_SERVICE_POLICY", path)
    return path


def test_root_installs_without_starting_the_service(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While apt-get works, services are denied; afterwards nothing of that is left."""
    found: list[Programs] = []
    ran: list[list[str]] = []
    told: list[str] = []

    def run(words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        assert os.access(policy, os.X_OK)
        assert policy.read_text().endswith("exit 101\n")
        assert env["DEBIAN_FRONTEND"] == "noninteractive"
        ran.append(words)
        if len(ran) == 3:
            found.append(PROGRAMS)
        return subprocess.CompletedProcess(words, 100 if len(ran) == 1 else 0, "", "no such package")

    monkeypatch.setattr(rabbitmq_node, "find_programs", lambda: found[0] if found else None)
    monkeypatch.setattr(rabbitmq_node, "_run", run)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(rabbitmq_node.shutil, "which", lambda name: f"/usr/bin/{name}")

    assert programs(told.append) == PROGRAMS

    assert [words[1] for words in ran] == ["install", "update", "install"]
    assert not policy.exists()
    assert len(told) == 1


def test_an_installation_that_fails_says_why_and_leaves_the_owners_policy(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line of apt-get is the reason; a policy that stood already stays as it is."""
    policy.write_text("#!/bin/sh\nexit 0\n")
    monkeypatch.setattr(rabbitmq_node, "find_programs", lambda: None)
    monkeypatch.setattr(
        rabbitmq_node, "_run", lambda words, _: subprocess.CompletedProcess(words, 100, "", "E: no network\n")
    )
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(rabbitmq_node.shutil, "which", lambda name: f"/usr/bin/{name}")

    with pytest.raises(DemoError, match="apt-get could not install rabbitmq-server: E: no network"):
        programs(lambda _: None)

    assert policy.read_text() == "#!/bin/sh\nexit 0\n"
