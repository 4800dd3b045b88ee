"""Rollouts in virtual time: what a policy does to good and to bad versions, in small."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from inferfleet.cli.simulate import simulate as command
from inferfleet.core.replaying import Recording, added, replay
from inferfleet.core.simulation import Outcome, Scenario, simulate, summary
from inferfleet.errors import ConfigError
from inferfleet.policies import default_policy, parse_policy
from inferfleet.summaries import Clustered
from tests.support.rollouts import ROUTE, T0, window

POLICY = default_policy()
STEP = "[[step]]\npercent = 50\ndwell_s = 600\nminimum = 1000"
SHORT = parse_policy(f"bake_s = 120\nshadow.enabled = false\n{STEP}", "policy.toml")


def run(scenario: Scenario, rollouts: int) -> list[Outcome]:
    return simulate(POLICY, scenario, ROUTE, rollouts, seed=7)


def test_good_versions_are_promoted() -> None:
    """Of 30 at most 3 are aborted: were it 0.5 % in truth (the alpha), four would be 1 in 60,000 runs."""
    found = [each.phase for each in run(Scenario(), 30)]

    assert found.count("aborted") <= 3
    assert found.count("done") >= 27


@pytest.mark.parametrize("more", [{}, {"batch_errors": 0.5}, {"repeat_keys": 5.0}])
def test_three_times_the_errors_are_found(more: dict[str, float]) -> None:
    """1 to 3 %: at least 17 of 20; were it 99 % in truth, fewer would be 1 in 20,000 runs."""
    found = run(Scenario(regression=0.03)._replace(**more), 20)

    assert sum(each.phase == "aborted" for each in found) >= 17
    assert all(each.phase != "done" for each in found)


def test_a_quiet_topic_is_never_promoted() -> None:
    """One message in two seconds: six hours, then inconclusive."""
    assert {each.phase for each in run(Scenario(rate=0.5), 3)} == {"inconclusive"}


def test_a_slow_version_is_found() -> None:
    """1.5 times the model time."""
    assert {each.phase for each in run(Scenario(slow=1.5), 5)} == {"aborted"}


def test_the_same_seed_gives_the_same() -> None:
    """Rollout by rollout, however many are run."""
    assert simulate(SHORT, Scenario(), ROUTE, 2, 1) == simulate(SHORT, Scenario(), ROUTE, 3, 1)[:2]
    assert simulate(SHORT, Scenario(), ROUTE, 1, 1) != simulate(SHORT, Scenario(), ROUTE, 1, 2)


def test_gates_are_passed_only_by_people() -> None:
    """Nobody approves unless the scenario says so."""
    policy = msgspec.structs.replace(SHORT, gate_before=(100.0,))

    assert simulate(policy, Scenario(), ROUTE, 1, 1)[0].phase == "inconclusive"
    assert simulate(policy, Scenario(approve=True), ROUTE, 1, 1)[0].phase == "done"


def test_a_summary_counts() -> None:
    """Shares with intervals, medians, reasons."""
    done = Outcome("done", "promoted: x", 10, 5, 100, 1, 0)
    bad = Outcome("aborted", "errors: x", 20, 15, 300, 9, 2)
    found = summary([done, done, bad, bad])

    assert (found.aborted.estimate, found.promoted.estimate, found.inconclusive.estimate) == (0.5, 0.5, 0)
    assert found.reasons == {"aborted: errors": 2, "done": 2}
    assert (found.seconds[0], found.held) == (15, 2)


def recorded(minutes: int = 30) -> Recording:
    return Recording(
        [
            window("stable", "1", requests=40, failed=index % 2, at_ms=T0 + minute * 60_000)
            for minute in range(minutes)
            for index in range(60)
        ]
    )


def test_recorded_traffic_is_played() -> None:
    """The same version in both arms is promoted; with failures added it is aborted."""
    recording = recorded()

    assert recording.error_rate == pytest.approx(0.0125)
    assert replay(SHORT, Scenario(), ROUTE, recording, 2, 1)[0].phase == "done"
    assert replay(SHORT, Scenario(regression=0.05), ROUTE, recording, 2, 1)[0].phase == "aborted"


def test_added_failures_keep_the_sums_of_clusters() -> None:
    """One failure in each of some batches that had none."""
    before = Clustered(10, 40, 0, 160, 0, 0)

    assert added(before, 3) == Clustered(10, 40, 3, 160, 3, 12)


def written(tmp_path: Path, text: str = "bake_s = 60\n") -> str:
    path = tmp_path / "policy.toml"
    steps = "shadow.enabled = false\n[[step]]\npercent = 50\ndwell_s = 300\nminimum = 500\n"
    path.write_text(text + steps)
    return str(path)


def test_the_command_prints_shares_and_times(tmp_path: Path) -> None:
    """In words, and as JSON."""
    plain = CliRunner().invoke(command, [written(tmp_path), "--rollouts", "2"])
    bad = CliRunner().invoke(command, [written(tmp_path), "--rollouts", "2", "--regression", "0.2", "--json"])

    assert plain.exit_code == bad.exit_code == 0, plain.output + bad.output
    assert "aborted (false)" in plain.output
    assert json.loads(bad.output)["aborted"]["estimate"] == 1
    assert json.loads(bad.output)["scenario"]["regression"] == 0.2


def test_the_command_plays_recordings(tmp_path: Path) -> None:
    """Lines of JSON, each a window; a line that is none is named."""
    lines = tmp_path / "windows.jsonl"
    windows = [each for minute in recorded(2).minutes for each in minute]
    lines.write_text("\n".join(msgspec.json.encode(each).decode() for each in windows))
    asked = [written(tmp_path), "--rollouts", "1", "--recorded", str(lines)]
    done = CliRunner().invoke(command, asked)
    assert done.exit_code == 0, done.output

    lines.write_text("{}\n")
    wrong = CliRunner().invoke(command, asked)
    assert isinstance(wrong.exception, ConfigError)
    assert "windows.jsonl:1: this is no window" in str(wrong.exception)
    lines.write_text("")
    assert "no window of an answering version" in str(CliRunner().invoke(command, asked).exception)


def test_only_canaries_are_simulated(tmp_path: Path) -> None:
    """The other kinds say so."""
    path = tmp_path / "policy.toml"
    path.write_text('kind = "shadow"')

    assert 'kind "shadow" cannot be simulated' in str(CliRunner().invoke(command, [str(path)]).exception)
