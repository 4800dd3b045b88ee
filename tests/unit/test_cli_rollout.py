"""What the rollout verbs print, and what they refuse."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from inferfleet.cli import cli, control, rollout
from inferfleet.config import Config
from inferfleet.control_ports import ControlStore
from inferfleet.models.repository import Repository
from tests.support.rollout_fleet import FAST, RolloutFleet, Shelf


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RolloutFleet:
    """A fleet in memory that the command line finds instead of Redis."""
    made = RolloutFleet()

    @contextlib.contextmanager
    def opened(config: Config) -> Iterator[ControlStore]:
        yield made.plane

    def shelf(repository: Repository) -> Shelf:
        return Shelf()

    monkeypatch.setattr(control, "opened", opened)
    monkeypatch.setattr(control, "RepositoryCatalogue", shelf)
    monkeypatch.setattr("inferfleet.worker.clock.SystemClock", lambda: made.clock)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.toml").write_text('[fleet]\nname = "t"\n')
    (tmp_path / "fast.toml").write_text(
        'kind = "canary"\nbake_s = 20\nstep_limit_s = 600\n'
        "[shadow]\nenabled = false\n"
        "[[step]]\npercent = 5\ndwell_s = 10\nminimum = 50\n"
    )
    return made


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["rollout", *words])
    assert result.exit_code == code, result.output
    return result


def test_a_rollout_is_started_shown_steered_and_aborted(fleet: RolloutFleet) -> None:
    """Each verb answers with where the rollout stands then."""
    started = run("start", "digits", "--to", "2", "--policy", "fast.toml", "--reason", "more  data").output
    assert "canary of digits 2 over 1" in started
    assert "more data" in started
    assert rollout.NOBODY_LEADS in started

    fleet.run(8)
    shown = run("status", "digits").output
    assert "step 1 of 1" in shown
    assert "canary 5 %" in shown
    assert rollout.NOBODY_LEADS not in shown
    assert "errors" in shown

    assert "paused by ann: lunch" in run("pause", "digits", "--actor", "ann", "--reason", "lunch").output
    assert "is paused already" in run("pause", "digits", code=1).output
    run("resume", "digits", "--actor", "ann")
    assert "outcome wrong labels" in run("abort", "digits", "--reason", "wrong labels").output
    assert "has ended" in run("promote", "digits", code=1).output

    plain = json.loads(run("status", "--json").output)
    assert [each["phase"] for each in plain["rollouts"]] == ["aborted"]
    assert plain["leader"] == "c-0"
    (one,) = plain["rollouts"]
    assert json.loads(run("status", one["id"], "--json").output)["phase"] == "aborted"


def test_latest_is_resolved_once(fleet: RolloutFleet) -> None:
    """What it means is written down as a number."""
    run("start", "digits", "--to", "latest", "--kind", "blue-green")

    (found,) = fleet.control.list()
    assert found.to_version == "9"
    assert found.kind == "blue-green"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("start", "digts", "--to", "2"), "digits"),
        (("start", "digits", "--to", "2x"), "version"),
        (("start", "digits", "--to", "2", "--policy", "fast.toml", "--kind", "ab"), "--kind ab is asked for"),
        (("start", "digits", "--to", "2", "--kind", "ab"), "metric"),
        (("pause", "digits"), "no rollout"),
        (("status", "nothing"), "no rollout"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(fleet: RolloutFleet, words: tuple[str, ...], said: str) -> None:
    """And exits 1."""
    result = run(*words, code=1)

    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert fleet.control.list() == []


def test_without_any_the_list_says_how_to_begin(fleet: RolloutFleet) -> None:
    """An empty table helps nobody."""
    assert "rollout start" in run("status").output
    assert fleet.rate > 0


def test_watching_ends_with_the_rollout(fleet: RolloutFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows each turn, and the end."""
    fleet.start(policy={**FAST, "shadow": {"enabled": False}})
    monkeypatch.setattr("inferfleet.cli.rollout.time.sleep", lambda _: fleet.run(10))

    shown = run("status", "digits", "--watch").output

    assert "phase   step" in shown
    assert "phase   done" in shown
