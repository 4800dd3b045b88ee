"""The workers that have registered at the control plane, as ``inferfleet status`` shows them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import click
import msgspec

from inferfleet.cli import control
from inferfleet.cli.frame import echo_table
from inferfleet.config import Config
from inferfleet.errors import ControlError
from inferfleet.plane import WorkerReport


class Registered(msgspec.Struct, frozen=True):
    """What one worker reports; ``behind`` counts the revisions of the log that it has not seen.

    ``revision_age_s`` says for how long it has not: the age of the oldest of them; 0 where it is up to date.
    ``lag`` counts records not taken yet, ``rows_per_s`` is over all its routes.
    """

    worker: str
    pool: str
    device: str
    release: str
    revision: int
    behind: int
    revision_age_s: float
    ready: list[str]
    loading: list[str]
    refused: dict[str, str]
    lag: int
    rows_per_s: float
    stale: str
    draining: bool
    reported_s: float


class Fleet(msgspec.Struct, frozen=True):
    """The registered workers and the log's head; ``note`` says why they are unknown."""

    revision: int = 0
    epoch: int = 0
    workers: list[Registered] = []
    note: str = ""


def registered(config: Config) -> Fleet | None:
    """Return what the control plane knows of the workers; ``None`` where the routes come from a file."""
    if config.routes.source != "fleet":
        return None
    try:
        with control.opened(config) as store:
            workers = store.workers()
            head = store.head()
            seen = min((each.head.number for each in workers), default=head.number)
            times = {}
            if seen < head.number:
                times = {
                    each.number: each.at_ms for each in store.history(limit=min(1_000, head.number - seen))
                }
    except ControlError as error:
        return Fleet(note=str(error))
    now_ms = time.time_ns() // 1_000_000
    return Fleet(head.number, head.epoch, [_of(each, head.number, times, now_ms) for each in workers])


def _of(report: WorkerReport, head: int, times: dict[int, int], now_ms: int) -> Registered:
    own = report.head.number
    unseen = [at_ms for number, at_ms in times.items() if number > own]
    return Registered(
        worker=report.worker,
        pool=report.pool,
        device=report.device,
        release=report.release,
        revision=own,
        behind=max(0, head - own),
        revision_age_s=max(0, now_ms - min(unseen, default=now_ms)) / 1000,
        ready=report.ready,
        loading=report.loading,
        refused=report.refused,
        lag=sum(report.lag.values()),
        rows_per_s=sum(report.rows_per_s.values()),
        stale=report.stale,
        draining=report.draining,
        reported_s=max(0, now_ms - report.at_ms) / 1000,
    )


def print_registered(fleet: Fleet) -> None:
    """Print the workers as a table, and what is wrong with each below it."""
    if fleet.note:
        click.echo(f"registered workers are unknown: {fleet.note}")
        return
    count = len(fleet.workers)
    click.echo(
        f"control plane  revision {fleet.revision} of epoch {fleet.epoch}  "
        f"{count} registered worker{'' if count == 1 else 's'}"
    )
    if fleet.workers:
        click.echo()
        headings = ("worker", "pool", "device", "revision", "ready", "lag", "rows/s")
        echo_table(headings, [_row(each) for each in fleet.workers])
        for line in _troubles(fleet.workers):
            click.echo(line)
    click.echo()


def _row(each: Registered) -> Sequence[object]:
    revision = (
        str(each.revision) if not each.behind else f"{each.revision} ({each.revision_age_s:.0f} s behind)"
    )
    ready = ", ".join([*each.ready, *(f"{name} (loads)" for name in each.loading)]) or "-"
    return each.worker, each.pool, each.device, revision, ready, each.lag, round(each.rows_per_s)


def _troubles(workers: Iterable[Registered]) -> Iterable[str]:
    for each in workers:
        if each.stale:
            yield f"  {each.worker} serves by routes that may be old: {each.stale}"
        if each.draining:
            yield f"  {each.worker} drains"
        for version, reason in each.refused.items():
            yield f"  {each.worker} refuses {version}: {reason}"
