"""What ``inferfleet doctor`` looks at: each finding is one line that says what is wrong and the mend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import msgspec

from inferfleet.cli.frame import Session
from inferfleet.cli.topology import (
    TOPIC_ACCESS,
    Role,
    needs,
    route_topics,
    uses_kafka,
    uses_rabbitmq,
)
from inferfleet.config import Config, check_supported
from inferfleet.errors import BrokerError, ConfigError, InferfleetError
from inferfleet.naming import retry_group
from inferfleet.routes import Route, refuse_unsupported

if TYPE_CHECKING:
    from inferfleet.cli.kafka import Cluster, TopicFacts
    from inferfleet.models.repository import Repository
    from inferfleet.records import TensorSpec

PLAN_HINT = "`inferfleet topics plan` prints how to create it"
RIGHTS_HINT = "`inferfleet topics plan --format acls` prints the rights"
OLDEST_RABBITMQ = (3, 10)
"""The first in which a queue hands on what has waited without losing any of it."""


class Finding(msgspec.Struct, frozen=True):
    """One line of the examination; ``warn`` works and may surprise, ``FAIL`` does not work."""

    name: str
    verdict: Literal["ok", "warn", "FAIL"]
    text: str


def examine(session: Session, load_models: bool, partitions: int | None) -> Iterator[Finding]:
    """Look at everything that a worker with these settings needs; each finding as soon as it is known.

    ``partitions`` is the count that sources should have, ``None`` where nobody said.
    """
    try:
        config = session.config
        check_supported(config)
    except InferfleetError as error:
        yield Finding("config", "FAIL", str(error))
        return
    yield Finding("config", "ok", f"{config.path}, fleet {config.fleet.name}, pool {config.worker.pool}")
    routes: tuple[Route, ...] = ()
    try:
        routes = _pool_routes(session)
        yield Finding("routes", "ok", f"{session.routes_origin}, {', '.join(route.name for route in routes)}")
    except InferfleetError as error:
        yield Finding("routes", "FAIL", str(error))
    if uses_kafka(routes) or not routes:
        yield from _kafka(config, routes, partitions)
    if uses_rabbitmq(routes):
        yield from _rabbitmq(config, routes)
    if any(each.kind == "redis" for route in routes for each in route.results):
        yield _redis(config)
    if config.routes.source == "fleet":
        yield _control(config)
    yield from _models(config, routes, load_models)
    yield _admin(config)


def _pool_routes(session: Session) -> tuple[Route, ...]:
    pool = session.config.worker.pool
    routes = session.routes.of_pool(pool)
    where = session.routes_origin
    if not routes:
        pools = sorted({route.pool for route in session.routes.routes})
        raise ConfigError(
            f'{where}: no route is in pool "{pool}"; pools with routes: {", ".join(pools) or "none"}'
        )
    for route in routes:
        refuse_unsupported(route, f"{where}: ")
    return routes


def _kafka(config: Config, routes: Sequence[Route], partitions: int | None) -> Iterator[Finding]:
    from inferfleet.cli.kafka import Cluster

    try:
        cluster = Cluster(config)
    except InferfleetError as error:
        yield Finding("kafka", "FAIL", str(error))
        return
    try:
        standing = cluster.topics()
        protocol = config.kafka.client.get("security.protocol", "PLAINTEXT")
        yield Finding("kafka", "ok", f"{cluster.address} answers ({protocol})")
        needed = {name: role for route in routes for role, name in route_topics(config, route)}
        facts = _topic_facts(cluster, standing, list(needed))
        for route in routes:
            yield from _topics(config, route, facts, partitions)
        taken = [route for route in routes if route.source.kind == "kafka"]
        if taken:
            yield _group(cluster, config.group)
        if any(role == "retries" for route in taken for role, _ in route_topics(config, route)):
            yield _group(cluster, retry_group(config, config.worker.pool))
    except BrokerError as error:
        yield Finding("kafka", "FAIL", str(error))
    finally:
        cluster.close()


def _topic_facts(cluster: Cluster, standing: dict[str, int], names: Sequence[str]) -> dict[str, TopicFacts]:
    """Return the broker's description of each topic; a broker without one is asked by metadata only."""
    from inferfleet.cli.kafka import TopicFacts

    facts = cluster.describe_topics(names)
    return {
        name: TopicFacts(standing[name]) if name in standing and facts[name].problem else facts[name]
        for name in names
    }


def _topics(
    config: Config, route: Route, facts: dict[str, TopicFacts], partitions: int | None
) -> Iterator[Finding]:
    source_count = facts[route.source.name].partitions if route.source.kind == "kafka" else 0
    for role, name in route_topics(config, route):
        label, found = f"topic {name}", facts[name]
        if found.problem:
            mend = RIGHTS_HINT if found.denied else PLAN_HINT
            yield Finding(label, "FAIL", f"{role} of route {route.name}: {found.problem}; {mend}")
            continue
        lacking = sorted(TOPIC_ACCESS[role] - found.rights) if found.rights else []
        if lacking and "ALL" not in found.rights:
            text = f"{role} of route {route.name}: this user has no {lacking[0]} right on it; {RIGHTS_HINT}"
            yield Finding(label, "FAIL", text)
            continue
        yield judge_count(label, role, route, found.partitions, source_count, partitions)


def judge_count(
    label: str, role: Role, route: Route, count: int, source_count: int, expected: int | None
) -> Finding:
    """Judge a partition count."""
    said = f"{role} of route {route.name}, {count} partition{'' if count == 1 else 's'}"
    if role == "source" and expected is not None and count != expected:
        return Finding(label, "FAIL", f"{said}, expected {expected}; mend it with kafka-topics.sh --alter")
    if role == "source" and count == 1:
        return Finding(label, "warn", f"{said}: one worker at a time can take from it")
    if role == "results" and source_count and count != source_count:
        verdict: Literal["warn", "FAIL"] = "FAIL" if route.order == "key" else "warn"
        text = f"{said}, its source has {source_count}: a key is answered in a partition of another number"
        return Finding(label, verdict, text)
    return Finding(label, "ok", said)


def _group(cluster: Cluster, group: str) -> Finding:
    label = f"group {group}"
    try:
        facts = cluster.describe_group(group)
    except BrokerError as error:
        if "uthorization" in str(error) or "ccess denied" in str(error):
            return Finding(label, "FAIL", f"this user has no READ right on it; {RIGHTS_HINT}")
        return Finding(label, "warn", f"{error}; members and rights are not checked")
    if facts.rights and not facts.rights & {"READ", "ALL"}:
        return Finding(label, "FAIL", f"this user has no READ right on it; {RIGHTS_HINT}")
    return Finding(label, "ok", f"{len(facts.members)} members now")


def _rabbitmq(config: Config, routes: Sequence[Route]) -> Iterator[Finding]:
    from inferfleet.cli.rabbitmq import RabbitCluster

    try:
        with RabbitCluster(config) as cluster:
            yield _rabbitmq_version(cluster.address, cluster.version)
            for need in needs(config, routes):
                if need.broker == "rabbitmq":
                    found = cluster.problems([need])
                    text = f"{need.use}: {found[0].text}" if found else need.use
                    yield Finding(str(need), "FAIL" if found else "ok", text)
    except InferfleetError as error:
        yield Finding("rabbitmq", "FAIL", str(error))


def _rabbitmq_version(address: str, version: str) -> Finding:
    """Judge the broker's version; its delivery limit and consumer_timeout are not to be seen by AMQP."""
    said = f"{address} answers ({version or 'it does not say its version'})"
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if number and number < OLDEST_RABBITMQ:
        return Finding("rabbitmq", "FAIL", f"{said}; delayed retries need RabbitMQ 3.10 or newer")
    return Finding("rabbitmq", "ok", said)


def _redis(config: Config) -> Finding:
    from inferfleet.redis_access import REDIS_ERRORS, open_redis, place_of

    key = f"{config.fleet.name}:result:doctor:ping"
    where = f"[redis] {config.redis.mode}"
    try:
        client = open_redis(replace(place_of(config), timeout_s=3.0))
        try:
            client.ping()
            client.get(key)
        finally:
            client.close()
    except ConfigError as error:
        return Finding("redis", "FAIL", str(error))
    except REDIS_ERRORS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        mend = "check [redis] url, username and password" if "WRONGPASS" in said or "NOAUTH" in said else ""
        return Finding("redis", "FAIL", f"{where}: {said}; {mend or 'check [redis] url and that it runs'}")
    return Finding("redis", "ok", f"{where} answers")


def _control(config: Config) -> Finding:
    """Look at the control plane's log, and whether the workers that follow it hold no more than it has."""
    from inferfleet.cli.control import opened
    from inferfleet.core.barrier import ahead

    try:
        with opened(config) as store:
            workers = store.workers()
            head = store.load().head
    except InferfleetError as error:
        return Finding("control", "FAIL", str(error))
    said = f"revision {head.number} of epoch {head.epoch}, {len(workers)} workers follow it"
    lost = ahead(head, workers)
    if lost:
        text = f"{said}, but {lost[0].worker} {lost[0].text}; `inferfleet route apply --reset FILE` mends it"
        return Finding("control", "FAIL", text)
    return Finding("control", "ok", said)


def _models(config: Config, routes: Sequence[Route], load: bool) -> Iterator[Finding]:
    if not routes:
        return
    from inferfleet.models.repository import Repository

    try:
        repository = Repository(config.models_path, config.models.trusted)
    except InferfleetError as error:
        yield Finding("models", "FAIL", f"{config.path}: {error}")
        return
    inputs: dict[tuple[str, str], tuple[TensorSpec, ...]] = {}
    for model, version in dict.fromkeys((r.model, v) for r in routes for v in sorted(r.versions, key=int)):
        label = f"model {model} version {version}"
        try:
            yield Finding(label, "ok", _try_model(config, repository, model, version, load, inputs))
        except InferfleetError as error:
            yield Finding(label, "FAIL", str(error).removeprefix(f"{label}: "))
    for route in routes:
        known = {
            inputs[key] for key in ((route.model, version) for version in route.versions) if key in inputs
        }
        if len(known) > 1:
            text = "its versions differ in their inputs; they must take the same requests"
            yield Finding(f"route {route.name}", "FAIL", text)


def _try_model(
    config: Config,
    repository: Repository,
    model: str,
    version: str,
    load: bool,
    inputs: dict[tuple[str, str], tuple[TensorSpec, ...]],
) -> str:
    from inferfleet.runtimes import registry

    found = repository.fetch(model, version)
    told = f"{found.runtime}, {found.size_bytes:,} bytes as in the manifest"
    if not load:
        return f"{told}, not loaded"
    loaded = registry.load(found, config.worker.device, config.worker.threads)
    try:
        inputs[model, version] = loaded.signature.inputs
        shapes = ", ".join(
            f"{spec.name} {spec.datatype}{list(spec.shape)}" for spec in loaded.signature.inputs
        )
        return f"{told}, loaded on {config.worker.device}, takes {shapes}"
    finally:
        loaded.close()


def _admin(config: Config) -> Finding:
    from prometheus_client import CollectorRegistry

    from inferfleet.cli.status import ask_worker
    from inferfleet.telemetry.admin import AdminServer, Health

    address = config.worker.admin_address
    try:
        AdminServer(address, CollectorRegistry(), lambda: Health(True, True)).close()
    except ConfigError as error:
        answer = ask_worker(address, 1.0)
        if answer.status is not None and answer.status.group == config.group:
            text = f"{address}, worker {answer.status.worker} of this fleet runs there"
            return Finding("admin", "warn", f"{text}; another one on this host needs another port")
        return Finding("admin", "FAIL", str(error))
    return Finding("admin", "ok", f"{address} is free")
