"""``inferfleet rollout simulate``: what a policy does to good and bad versions, before it is used on one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from inferfleet.cli.frame import echo_json
from inferfleet.errors import ConfigError

if TYPE_CHECKING:
    from inferfleet.core.comparing import Interval
    from inferfleet.core.replaying import Recording
    from inferfleet.core.simulation import Scenario, Summary
    from inferfleet.policies import Policy

_ROUTE = {
    "name": "simulated",
    "source": "kafka:in",
    "results": ["kafka:out"],
    "model": "simulated",
    "version": "1",
}
_SHARE = click.FloatRange(0, 1)


@click.command(epilog="Example: inferfleet rollout simulate policy.toml --rollouts 5000 --regression 0.03")
@click.argument("policy", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--rollouts", type=click.IntRange(1, 1_000_000), default=500, show_default=True)
@click.option(
    "--rate", type=click.FloatRange(min=0.001), default=200.0, show_default=True, help="Messages a second."
)
@click.option(
    "--error-rate", type=_SHARE, default=0.01, show_default=True, help="Failures of the old version."
)
@click.option(
    "--regression", type=_SHARE, default=None, help="Failures of the new version; left out: the same."
)
@click.option(
    "--slow", type=click.FloatRange(min=0.01), default=1.0, help="Model time of the new version, as a ratio."
)
@click.option(
    "--batch-size", type=click.IntRange(1, 4096), default=8, show_default=True, help="Messages in a batch."
)
@click.option("--batch-errors", type=_SHARE, default=0.0, help="Share of failures that take whole batches.")
@click.option(
    "--repeat-keys",
    type=click.FloatRange(min=1),
    default=1.0,
    help="Messages of a key over a rollout; above 1, a key fails always or never.",
)
@click.option("--approve", is_flag=True, help="People approve every gate at once; else nobody does.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--recorded",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Windows as JSON lines, played as traffic.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def simulate(
    policy: Path, rollouts: int, seed: int, recorded: Path | None, as_json: bool, **given: float
) -> None:
    """Run rollouts through a POLICY in virtual time, and count how they end.

    A version without a regression should be promoted, one with a regression aborted. What decides is the code
    that decides real rollouts.
    """
    from inferfleet.core import replaying, simulation
    from inferfleet.policies import load_policy
    from inferfleet.routes import route_of

    loaded = load_policy(policy)
    if loaded.kind != "canary":
        raise ConfigError(f'{policy}: policy kind "{loaded.kind}" cannot be simulated, only "canary" can')
    scenario = simulation.Scenario(**given)  # type: ignore[arg-type]  # click has made them what they are
    route = route_of(_ROUTE, "simulated", "simulation")
    if recorded is None:
        outcomes = simulation.simulate(loaded, scenario, route, rollouts, seed)
    else:
        recording = read_recording(recorded)
        outcomes = replaying.replay(loaded, scenario, route, recording, rollouts, seed)
    _print(simulation.summary(outcomes), scenario, loaded, as_json)


def read_recording(path: Path) -> Recording:
    """Return the windows of a file of JSON lines; raises ConfigError with the line that is none."""
    import msgspec

    from inferfleet import tables
    from inferfleet.core.replaying import Recording
    from inferfleet.summaries import Window

    decoder = msgspec.json.Decoder(Window)
    windows = []
    for number, line in enumerate(tables.read_text(path, "recording").splitlines(), 1):
        if line.strip():
            try:
                windows.append(decoder.decode(line))
            except msgspec.MsgspecError as error:
                raise ConfigError(f"{path}:{number}: this is no window: {error}") from None
    recording = Recording(windows)
    if not recording.minutes:
        raise ConfigError(f"{path}: no window of an answering version with requests stands there")
    return recording


def _print(found: Summary, scenario: Scenario, policy: Policy, as_json: bool) -> None:
    regressed = scenario.regression is not None or scenario.slow > 1
    if as_json:
        plain = {
            key: value._asdict() if hasattr(value, "_asdict") else value
            for key, value in found._asdict().items()
        }
        kind = {"policy": policy.hash, "kind": policy.kind, "regressed": regressed}
        echo_json({**kind, "scenario": scenario._asdict(), **plain})
        return
    wrong = "promoted (missed)" if regressed else "promoted"
    click.echo(f"{found.rollouts} rollouts of a version with{'' if regressed else 'out'} a regression")
    click.echo(f"  {wrong:24} {_share(found.promoted, found.rollouts)}")
    click.echo(
        f"  {'aborted' if regressed else 'aborted (false)':24} {_share(found.aborted, found.rollouts)}"
    )
    click.echo(f"  {'inconclusive':24} {_share(found.inconclusive, found.rollouts)}")
    for reason, count in found.reasons.items():
        if reason.startswith("aborted"):
            click.echo(f"    {reason}: {count}")
    click.echo(f"  {'with a hold':24} {found.held}")
    for name, (middle, high), unit in (
        ("time to the end", found.seconds, "s"),
        ("since first exposed", found.exposed_s, "s"),
        ("messages answered by it", found.answered, ""),
        ("of these failed", found.failed, ""),
    ):
        click.echo(f"  {name:24} median {middle:,.0f}{unit}, p90 {high:,.0f}{unit}")


def _share(interval: Interval, count: int) -> str:
    shown = f"{round(interval.estimate * count)} ({interval.estimate:.2%}"
    return f"{shown}, 95 % interval {interval.low:.2%} to {interval.high:.2%})"
