"""``inferfleet status``: who works, who holds which partitions, how far behind, what is paused and why."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from inferfleet.cli.frame import Session, echo_json, echo_table, pass_session
from inferfleet.errors import BrokerError
from inferfleet.telemetry.admin import WorkerStatus

if TYPE_CHECKING:
    from inferfleet.cli.kafka import Cluster, GroupFacts
    from inferfleet.config import Config
    from inferfleet.routes import Route


class PartitionStatus(msgspec.Struct, frozen=True):
    """One partition of a source: ``committed`` ``None`` says that the group never committed there."""

    topic: str
    partition: int
    committed: int | None
    end: int
    lag: int
    holder: str


class MemberStatus(msgspec.Struct, frozen=True):
    """One member of the consumer group."""

    client: str
    host: str
    partitions: int


class PoolStatus(msgspec.Struct, frozen=True):
    """The consumer group of one pool; ``note`` says in one line what could not be found out."""

    pool: str
    group: str
    state: str
    members: list[MemberStatus]
    partitions: list[PartitionStatus]
    lag: int
    note: str = ""


class WorkerAnswer(msgspec.Struct, frozen=True):
    """What one worker's admin address said."""

    address: str
    status: WorkerStatus | None
    note: str = ""


@click.command(epilog="Example: inferfleet status --admin 10.0.0.7:8471 --admin 10.0.0.8:8471")
@click.option(
    "--admin",
    "addresses",
    multiple=True,
    metavar="HOST:PORT",
    help="A worker's admin address; by default the one in the settings. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@pass_session
def status(session: Session, addresses: tuple[str, ...], as_json: bool) -> None:
    """Show each pool's members, partitions and lag, and what the workers say of themselves."""
    from inferfleet.cli.kafka import Cluster

    config, table = session.config, session.routes
    cluster = Cluster(config)
    try:
        standing = cluster.topics()
        pools = [
            pool_status(config, cluster, pool, table.of_pool(pool), standing)
            for pool in dict.fromkeys(route.pool for route in table.routes)
        ]
    finally:
        cluster.close()
    answers = [ask_worker(address) for address in addresses or (config.worker.admin_address,)]
    if as_json:
        echo_json({"pools": pools, "workers": answers})
        return
    for pool in pools:
        _print_pool(pool)
    for answer in answers:
        _print_worker(answer)


def pool_status(
    config: Config, cluster: Cluster, pool: str, routes: Sequence[Route], standing: dict[str, int]
) -> PoolStatus:
    """Return what the broker knows of one pool; what it cannot tell becomes the note."""
    group = config.group_of(pool)
    notes: list[str] = []
    facts: GroupFacts | None = None
    try:
        facts = cluster.describe_group(group)
    except BrokerError as error:
        notes.append(f"{error}; members are unknown")
    holders = {part: member.client for member in facts.members for part in member.assignment} if facts else {}
    sources = [route.source.name for route in routes]
    missing = [name for name in sources if name not in standing]
    if missing:
        notes.append(f"topic {', '.join(missing)} does not exist or may not be seen")
    rows: list[PartitionStatus] = []
    try:
        for each in cluster.positions(
            group, [(name, standing[name]) for name in sources if name in standing]
        ):
            holder = holders.get((each.topic, each.partition), "-" if facts else "?")
            rows.append(
                PartitionStatus(each.topic, each.partition, each.committed, each.end, each.lag, holder)
            )
    except BrokerError as error:
        notes.append(f"{error}; lag is unknown")
    members = (
        [MemberStatus(each.client, each.host, len(each.assignment)) for each in facts.members]
        if facts
        else []
    )
    state = facts.state.lower() if facts else "unknown"
    return PoolStatus(pool, group, state, members, rows, sum(each.lag for each in rows), "; ".join(notes))


def ask_worker(address: str, timeout_s: float = 2.0) -> WorkerAnswer:
    """Return what the worker at an admin address says of itself."""
    try:
        with urllib.request.urlopen(f"http://{address}/status", timeout=timeout_s) as response:
            return WorkerAnswer(address, msgspec.json.decode(response.read(), type=WorkerStatus))
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return WorkerAnswer(
            address, None, f"no worker answers at {address} ({reason}); name its admin address by --admin"
        )


def _print_pool(pool: PoolStatus) -> None:
    count = len(pool.members)
    members = "? members" if pool.state == "unknown" else f"{count} member{'' if count == 1 else 's'}"
    click.echo(f"pool {pool.pool}  group {pool.group}  {pool.state}  {members}  lag {pool.lag}")
    if pool.note:
        click.echo(f"  {pool.note}")
    if pool.members:
        click.echo()
        echo_table(("member", "host", "partitions"), [(m.client, m.host, m.partitions) for m in pool.members])
    if pool.partitions:
        click.echo()
        rows = [
            (p.topic, p.partition, "-" if p.committed is None else str(p.committed), p.end, p.lag, p.holder)
            for p in pool.partitions
        ]
        echo_table(("topic", "partition", "committed", "end", "lag", "held by"), rows)
    click.echo()


def _print_worker(answer: WorkerAnswer) -> None:
    found = answer.status
    if found is None:
        click.echo(answer.note)
        return
    ready = "ready" if found.ready else f"not ready: {', '.join(found.reasons)}"
    click.echo(
        f"worker {found.worker} at {answer.address}  {ready}  revision {found.revision or '-'}  "
        f"{found.in_flight_rows} rows in flight, the oldest {found.oldest_request_seconds:.1f} s"
    )
    for model, state in found.models.items():
        click.echo(f"  model {model}  {state}")
    for route, reason in found.paused.items():
        click.echo(f"  route {route} is paused: {reason}")
    if not found.paused:
        click.echo("  no route is paused")
