"""``inferfleet status``: who works, who holds which partitions, what waits where, what is paused and why."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from inferfleet.cli.frame import Session, echo_json, echo_table, pass_session
from inferfleet.cli.registered import print_registered, registered
from inferfleet.cli.topology import route_queues, route_topics, shares_pauses
from inferfleet.errors import BrokerError
from inferfleet.naming import retry_group
from inferfleet.telemetry.admin import WorkerStatus

if TYPE_CHECKING:
    from inferfleet.cli.kafka import Cluster, GroupFacts
    from inferfleet.cli.rabbitmq import RabbitCluster
    from inferfleet.config import Config
    from inferfleet.routes import Route


class PartitionStatus(msgspec.Struct, frozen=True):
    """One partition of a topic: ``committed`` ``None`` says that the group never committed there."""

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


class QueueStatus(msgspec.Struct, frozen=True):
    """One RabbitMQ queue: messages that nobody has taken, and the consumers of all workers."""

    queue: str
    role: str
    ready: int
    consumers: int


class PoolStatus(msgspec.Struct, frozen=True):
    """One pool; ``note`` says in one line what could not be found out.

    ``lag`` counts requests that no worker has taken, in topics and queues; ``retrying`` those that wait for
    a further attempt. ``state`` and ``members`` are the consumer group's; ``-`` without Kafka. ``paused``
    maps routes to reasons, as far as the pool shares its pauses; workers may have some of their own.
    """

    pool: str
    group: str
    state: str
    members: list[MemberStatus]
    partitions: list[PartitionStatus]
    lag: int
    note: str = ""
    queues: list[QueueStatus] = []
    retries: list[PartitionStatus] = []
    retrying: int = 0
    paused: dict[str, str] = {}


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
    help="A worker's admin address; by default the one in the settings (none with source fleet).",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@pass_session
def status(session: Session, addresses: tuple[str, ...], as_json: bool) -> None:
    """Show each pool's members, partitions, queues and lag, and what the workers say of themselves."""
    config, table = session.config, session.routes
    pools = {pool: table.of_pool(pool) for pool in dict.fromkeys(route.pool for route in table.routes)}
    with contextlib.ExitStack() as open_until_the_end:
        kafka = _kafka(config, table.routes, open_until_the_end)
        rabbitmq = _rabbitmq(config, table.routes, open_until_the_end)
        standing = kafka.topics() if kafka is not None else {}
        found = [
            pool_status(config, pool, routes, kafka, standing, rabbitmq) for pool, routes in pools.items()
        ]
    fleet = registered(config)
    # Where workers register, the address in the settings says nothing of most of them.
    asked = addresses or (() if fleet is not None else (config.worker.admin_address,))
    answers = [ask_worker(address) for address in asked]
    if as_json:
        said = {"pools": found, "workers": answers}
        echo_json(said if fleet is None else {**said, "control": fleet})
        return
    for each in found:
        _print_pool(each)
    if fleet is not None:
        print_registered(fleet)
    for answer in answers:
        _print_worker(answer)


def _kafka(config: Config, routes: Iterable[Route], until: contextlib.ExitStack) -> Cluster | None:
    if not any(route.source.kind == "kafka" for route in routes):
        return None
    from inferfleet.cli.kafka import Cluster

    cluster = Cluster(config)
    until.callback(cluster.close)
    return cluster


def _rabbitmq(config: Config, routes: Iterable[Route], until: contextlib.ExitStack) -> RabbitCluster | None:
    if not any(route_queues(config, route) for route in routes):
        return None
    from inferfleet.cli.rabbitmq import RabbitCluster

    return until.enter_context(RabbitCluster(config))


def pool_status(
    config: Config,
    pool: str,
    routes: Sequence[Route],
    kafka: Cluster | None,
    standing: dict[str, int],
    rabbitmq: RabbitCluster | None,
) -> PoolStatus:
    """Return what the brokers know of one pool; what they cannot tell becomes the note."""
    group = config.group_of(pool)
    notes: list[str] = []
    facts: GroupFacts | None = None
    rows: list[PartitionStatus] = []
    retries: list[PartitionStatus] = []
    sources = [route.source.name for route in routes if route.source.kind == "kafka"]
    if kafka is not None and sources:
        facts = _described(kafka, group, notes)
        rows = _partitions(kafka, group, sources, standing, facts, notes)
        topics = [
            topic for route in routes for role, topic in route_topics(config, route) if role == "retries"
        ]
        behind = retry_group(config, pool)
        # A broker that cannot tell the members of one group would only say so twice.
        takers = _described(kafka, behind, notes) if facts is not None and topics else None
        retries = _partitions(kafka, behind, topics, standing, takers, notes)
    queues = _queues(config, routes, rabbitmq, notes)
    paused = _paused(config, routes, notes)
    return PoolStatus(
        pool=pool,
        group=group,
        state=facts.state.lower() if facts else "unknown" if sources else "-",
        members=[
            MemberStatus(each.client, each.host, len(each.assignment))
            for each in (facts.members if facts else ())
        ],
        partitions=rows,
        lag=sum(each.lag for each in rows) + _ready(queues, "source"),
        note="; ".join(notes),
        queues=queues,
        retries=retries,
        retrying=sum(each.lag for each in retries) + _ready(queues, "retries", "ready retries"),
        paused=paused,
    )


def _ready(queues: Iterable[QueueStatus], *roles: str) -> int:
    return sum(each.ready for each in queues if each.role in roles)


def _paused(config: Config, routes: Sequence[Route], notes: list[str]) -> dict[str, str]:
    if not shares_pauses(config, routes):
        return {}
    from inferfleet.cli.pauses import SharedPauses

    try:
        with SharedPauses(config) as pauses:
            found = pauses.current(route.name for route in routes)
    except BrokerError as error:
        notes.append(f"{error}; pauses are unknown")
        return {}
    return {name: pause.shown for name, pause in found.items()}


def _described(kafka: Cluster, group: str, notes: list[str]) -> GroupFacts | None:
    try:
        return kafka.describe_group(group)
    except BrokerError as error:
        notes.append(f"{error}; members are unknown")
        return None


def _partitions(
    kafka: Cluster,
    group: str,
    topics: Sequence[str],
    standing: dict[str, int],
    facts: GroupFacts | None,
    notes: list[str],
) -> list[PartitionStatus]:
    """Return how far a group has come; ``facts`` say who holds what, where they are known."""
    holders = {part: member.client for member in facts.members for part in member.assignment} if facts else {}
    missing = [name for name in topics if name not in standing]
    if missing:
        notes.append(f"topic {', '.join(missing)} does not exist or may not be seen")
    try:
        found = kafka.positions(group, [(name, standing[name]) for name in topics if name in standing])
    except BrokerError as error:
        notes.append(f"{error}; lag is unknown")
        return []
    return [
        PartitionStatus(
            each.topic,
            each.partition,
            each.committed,
            each.end,
            each.lag,
            holders.get((each.topic, each.partition), "-" if facts else "?"),
        )
        for each in found
    ]


def _queues(
    config: Config, routes: Sequence[Route], rabbitmq: RabbitCluster | None, notes: list[str]
) -> list[QueueStatus]:
    wanted = {name: role for route in routes for role, name in route_queues(config, route)}
    if rabbitmq is None or not wanted:
        return []
    try:
        found = rabbitmq.queues(wanted)
    except BrokerError as error:
        notes.append(f"{error}; queues are unknown")
        return []
    missing = [name for name, depth in found.items() if depth is None]
    if missing:
        notes.append(f"queue {', '.join(missing)} does not exist")
    return [
        QueueStatus(name, wanted[name], depth.ready, depth.consumers)
        for name, depth in found.items()
        if depth is not None
    ]


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
    group = f"  {pool.state}  {members}" if pool.state != "-" else ""
    retrying = f"  {pool.retrying} wait for a further attempt" if pool.retrying else ""
    click.echo(f"pool {pool.pool}  group {pool.group}{group}  lag {pool.lag}{retrying}")
    if pool.note:
        click.echo(f"  {pool.note}")
    for route, reason in pool.paused.items():
        click.echo(f"  route {route} is paused: {reason}; `inferfleet route resume {route}` ends it")
    if pool.members:
        click.echo()
        echo_table(("member", "host", "partitions"), [(m.client, m.host, m.partitions) for m in pool.members])
    # Retry topics are many and mostly empty.
    partitions = [*pool.partitions, *(each for each in pool.retries if each.lag)]
    if partitions:
        click.echo()
        rows = [
            (p.topic, p.partition, "-" if p.committed is None else str(p.committed), p.end, p.lag, p.holder)
            for p in partitions
        ]
        echo_table(("topic", "partition", "committed", "end", "lag", "held by"), rows)
    if pool.queues:
        click.echo()
        queues = [(q.queue, q.role, q.ready, q.consumers) for q in pool.queues]
        echo_table(("queue", "role", "ready", "consumers"), queues)
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
