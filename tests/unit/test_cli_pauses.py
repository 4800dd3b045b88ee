"""Pausing a route by hand: at one worker's admin address, and what is refused before anybody is asked."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from prometheus_client import CollectorRegistry

from inferfleet.cli import cli
from inferfleet.control.pauses import Pause, decode_pause, encode_pause
from inferfleet.telemetry.admin import AdminServer, Health

ROUTES = """
[[route]]
name = "digits"
source = "rabbitmq:digits"
results = ["reply"]
model = "m"
version = "1"
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    (tmp_path / "fleet.toml").write_text("[redis]\nurl = 'redis://:canary@127.0.0.1:1/0'\n")
    (tmp_path / "routes.toml").write_text(ROUTES)
    return tmp_path / "fleet.toml"


@pytest.fixture
def paused() -> dict[str, str]:
    return {}


@pytest.fixture
def address(paused: dict[str, str]) -> Iterator[str]:
    """The admin address of a worker that serves the route digits."""
    with AdminServer(
        "127.0.0.1:0",
        CollectorRegistry(),
        lambda: Health(True, True),
        pause=paused.__setitem__,
        resume=paused.pop,
        serves=lambda name: name == "digits",
    ) as server:
        yield server.address


def run(fleet: Path, *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["--config", str(fleet), "route", *arguments])
    assert result.exit_code == code, result.output
    return result


def refused(fleet: Path, *arguments: str) -> str:
    said = run(fleet, *arguments, code=1).stderr
    assert said.count("\n") == 1
    return said


def test_one_worker_is_paused_at_its_admin_address(fleet: Path, address: str, paused: dict[str, str]) -> None:
    """The reason reaches the worker on one line; resume takes it away; Redis is not asked."""
    arguments = ("--admin", address, "--reason", "model 7\n  is wrong", "--actor", "eva")
    said = run(fleet, "pause", "digits", *arguments).stdout
    assert paused == {"digits": "model 7 is wrong (by eva)"}
    assert said.endswith(f"route digits is paused at {address}: model 7 is wrong (by eva)\n")

    run(fleet, "resume", "digits", "--admin", address)
    assert paused == {}


def test_what_the_worker_says_is_passed_on(fleet: Path, address: str) -> None:
    """A route that it does not serve, a port where nobody is, and what is no address: a line each."""
    assert 'no route of this worker is named "letters"' in refused(
        fleet, "pause", "letters", "--admin", address
    )
    assert "no worker answers at 127.0.0.1:1" in refused(fleet, "resume", "digits", "--admin", "127.0.0.1:1")
    assert '--admin = "nowhere" is not an address' in refused(fleet, "pause", "digits", "--admin", "nowhere")


def test_who_and_why_are_kept_as_they_can_be_written(
    fleet: Path, address: str, paused: dict[str, str]
) -> None:
    """One line each, and what no encoding writes is replaced."""
    words = ("--reason", "a\nb\udcff", "--actor", "al\udcffice", "--admin", address)
    run(fleet, "pause", "digits", *words)

    assert paused["digits"] == "a b? (by al?ice)"


def test_a_worker_that_cannot_pause_is_told_as_it_is(fleet: Path) -> None:
    """Whatever else listens there, its refusal is one line."""
    with AdminServer("127.0.0.1:0", CollectorRegistry(), lambda: Health(True, True)) as server:
        assert f"the worker at {server.address} refuses: POST goes to" in refused(
            fleet, "pause", "digits", "--admin", server.address
        )


def test_an_entry_of_an_earlier_release_has_no_person() -> None:
    """It shows its reason alone, as does whatever somebody wrote there by hand; a person's name is cut."""
    assert decode_pause(b'{"reason":"model 7","at_ms":1,"by":"operator on h"}').shown == "model 7"
    assert decode_pause(b"stop").shown == "stop"
    long = decode_pause(encode_pause(Pause("r", actor="a" * 5_000 + "\udc80")))
    assert long.shown == f"r (by {'a' * 200})"


def test_a_silent_address_is_waited_for_within_a_bound() -> None:
    """One that accepts and says nothing is named."""
    from inferfleet.cli.pauses import ask_admin
    from inferfleet.errors import BrokerError

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BrokerError, match=f"no worker answers at {address}"):
            ask_admin(address, "digits", "pause", timeout_s=0.2)


def test_a_pool_without_redis_is_paused_worker_by_worker(fleet: Path) -> None:
    """Where no worker would look, nothing is written; with [control] they do look, there."""
    said = refused(fleet, "pause", "digits")
    assert "the workers of pool default share no Redis" in said
    assert "--admin HOST:PORT" in said
    assert 'did you mean "digits"' in refused(fleet, "pause", "digit")

    fleet.write_text("[control]\nurl = 'redis://:canary@127.0.0.1:1/0'\n")
    away = refused(fleet, "pause", "digits")
    assert "Redis redis://127.0.0.1:1/0 keeps the pauses and does not answer" in away
    assert "check [control] url" in away
    assert "canary" not in away
