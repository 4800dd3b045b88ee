"""What the demo found, as tables, and where to look further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from inferfleet.demo import digits, files, sentences
from inferfleet.demo.broker import Broker
from inferfleet.demo.rollouts import Rollouts
from inferfleet.demo.screen import VersionLine, sum_table, version_table
from inferfleet.demo.stage import Batches, Stage
from inferfleet.demo.tally import Tally


@dataclass(frozen=True, slots=True)
class Killing:
    """Which worker was killed, which one took its place, and how things stood at that moment."""

    victim: str
    successor: str
    answered: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Findings:
    """All that the last table says. ``batches`` are per model and version, ``burst_s`` in seconds."""

    tally: Tally
    batches: Mapping[tuple[str, str], Batches]
    killing: Killing
    burst: int
    burst_s: float
    missing_in_redis: int
    admins: tuple[str, ...] = ()
    """The admin addresses of the workers that still run."""
    rollouts: Rollouts | None = None

    @property
    def lost(self) -> int:
        """Requests without an outcome in their result topic."""
        return len(self.tally.unanswered)

    @property
    def passed(self) -> bool:
        """Whether every request has its right answer in both places, and nothing else came."""
        tally = self.tally
        if self.lost or self.missing_in_redis or tally.errors or tally.wrong or tally.strangers:
            return False
        return self.rollouts is None or self.rollouts.passed


_WHAT = {
    ("digits", digits.MODEL): {
        version: f"{digits.MODEL} {version}: {name}" for version, name in digits.VERSIONS.items()
    },
    ("files", files.MODEL): {"1": "magika 1: file types"},
    (sentences.ROUTE, sentences.MODEL): {"1": "minilm 1: sentences"},
}


def tables(findings: Findings, broker: Broker) -> list[Table]:
    """Return what to draw at the end: the versions, and the sums."""
    shown = [version_table(_version_lines(findings)), sum_table(_sums(findings, broker))]
    return shown if findings.rollouts is None else [*shown, *_rollout_tables(findings.rollouts)]


def _rollout_tables(rollouts: Rollouts) -> list[Table]:
    ends = Table(title="What was rolled out on live traffic", title_justify="left")
    for name in ("version", "ended", "after", "why"):
        ends.add_column(name)
    for each in rollouts.endings:
        ends.add_row(each.title, each.phase, f"{each.seconds:.1f} s", each.outcome)
    count = rollouts.count
    rows = [
        ("live requests", f"{count.sent} sent, {rollouts.unanswered} lost, {count.errors} errors"),
        *(
            (f"version {version}", f"{served.answered} answered, {served.accuracy:.1%} right")
            for version, served in sorted(count.versions.items())
        ),
        ("version 3 answered for", f"{rollouts.bad_s:.1f} s, as a canary; as a shadow it answered nobody"),
    ]
    return [ends, sum_table(rows)]


def _version_lines(findings: Findings) -> list[VersionLine]:
    lines = []
    for (route, model), versions in _WHAT.items():
        for version, what in versions.items():
            tally = findings.tally.versions.get((route, version))
            if tally is not None:
                batches = findings.batches.get((model, version), Batches())
                lines.append(
                    VersionLine(route, what, tally.answered, tally.accuracy, batches.count, batches.rows)
                )
    return lines


def _sums(findings: Findings, broker: Broker) -> list[tuple[str, str]]:
    tally, killing = findings.tally, findings.killing
    rows = [
        ("sent", str(tally.sent)),
        ("answered", f"{tally.answered}, of these {tally.sent - findings.missing_in_redis} also in Redis"),
        ("lost", f"[bold {'red' if findings.lost else 'green'}]{findings.lost}[/]"),
        ("answered twice", f"{tally.duplicates} (at least once: what a killed worker had not settled)"),
        ("errors, wrong answers", f"{len(tally.errors)}, {len(tally.wrong)}"),
        (
            "killed",
            f"{killing.victim} by SIGKILL after {killing.answered} answers of all, with {killing.waiting} "
            f"requests under way; {killing.successor} took its place; {broker.takeover(killing.victim)}",
        ),
        ("slowest answer", f"{tally.slowest_s:.1f} s"),
        ("throughput", _throughput(findings)),
        ("answers by worker", ", ".join(f"{name} {count}" for name, count in sorted(tally.workers.items()))),
    ]
    rows += [("for example", line) for line in (tally.errors + tally.wrong)[:3]]
    return rows


def _throughput(findings: Findings) -> str:
    if not findings.burst_s:
        return "not measured: the last burst was not answered"
    rate = findings.burst / findings.burst_s
    return f"{rate:,.0f} requests/s in the last burst ({findings.burst} at once, {findings.burst_s:.2f} s)"


def hints(stage: Stage, broker: Broker, redis_port: int, admins: Sequence[str], kept: bool) -> str:
    """Return where to look: exact commands while it runs, how to have that otherwise."""
    if not kept:
        return (
            "Everything is stopped again. Settings, routes, models and logs stay in "
            f"{stage.folder}/ for a look.\nTo leave it running and ask it yourself: {_command()} --keep"
        )
    image = ",".join(str(int(pixel)) for pixel in digits.load_digits().images[0])
    tensor = f'{{"name":"image","datatype":"FP32","shape":[1,64],"data":[{image}]}}'
    body = f'{{"id":"mine","inputs":[{tensor}]}}'
    return "\n".join(
        [
            "It goes on running. Where to look:",
            f"  redis-cli -p {redis_port} GET inferfleet:result:digits:digit-42",
            *(f"  {line}" for line in broker.looks()),
            f"  {_program()} --config {stage.fleet_toml} status"
            + "".join(f" --admin {each}" for each in admins),
            *(f"  curl -s http://{each}/metrics" for each in admins),
            *([f"  http://{stage.api}/ in a browser: routes, rollouts, workers"] if stage.rollouts else []),
            "Ask it yourself, here with the picture of a zero:",
            *(f"  {line}" for line in broker.asks(body)),
            f"  redis-cli -p {redis_port} GET inferfleet:result:digits:mine",
            f"Logs are in {stage.logs}/, process ids in {stage.record}.",
            f"To end it: {_command()} --stop",
        ]
    )


def _program() -> str:
    beside = Path(".venv/bin/inferfleet")
    return str(beside) if beside.is_file() else "inferfleet"


def _command() -> str:
    return "./scripts/demo" if Path("scripts/demo").is_file() else "inferfleet demo"
