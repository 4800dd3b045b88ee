"""Kafka as an operator sees it: topics, rights, groups, positions; a failure is one line with its mend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AclOperation, AdminClient, NewTopic

from inferfleet.config import Config, kafka_client_config
from inferfleet.errors import BrokerError, ConfigError

ANSWER_S = 8.0
CONTROLLER_S = 3.0
"""How long a cluster may be without a controller until it is taken for one that has none."""
TAIL = 16
"""So near the end of a partition records are counted: offsets may be nothing but the ends of transactions."""
TAIL_S = 2.0

Answer = TypeVar("Answer")

_LOGIN = {KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED}
_AWAY = {
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TIMED_OUT,
    KafkaError._TIMED_OUT_QUEUE,
    KafkaError._RESOLVE,
}

# A leader that changes, or that a topic just created does not have yet.
_MOVING = {KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE}


class TopicFacts(NamedTuple):
    """A topic as the broker describes it; ``problem`` says why it cannot be seen."""

    partitions: int = 0
    rights: frozenset[str] = frozenset()
    problem: str = ""
    denied: bool = False


class Member(NamedTuple):
    """A member of a consumer group."""

    client: str
    host: str
    assignment: tuple[tuple[str, int], ...]


class GroupFacts(NamedTuple):
    """A consumer group as the broker describes it."""

    state: str
    members: tuple[Member, ...] = ()
    rights: frozenset[str] = frozenset()


class Position(NamedTuple):
    """How far a group has come in one partition; ``committed`` ``None``: it never committed there."""

    topic: str
    partition: int
    committed: int | None
    low: int
    end: int
    counted: int | None = None
    """How many records are left, where they were counted: ends of transactions have offsets too."""

    @property
    def next(self) -> int:
        """Where the group would go on."""
        return self.low if self.committed is None else max(self.committed, self.low)

    @property
    def lag(self) -> int:
        """Records between the committed position and the end; where nobody counted them, the offsets."""
        return self.end - self.next if self.counted is None else self.counted


class Cluster:
    """The Kafka of a fleet; connects when it is first asked. Close it."""

    def __init__(self, config: Config, answer_s: float = ANSWER_S) -> None:
        self.address = config.kafka.bootstrap_servers
        self._answer_s = answer_s
        self._errors: list[KafkaError] = []
        self._client = kafka_client_config(config) | {"error_cb": self._errors.append}
        self._consumer_overrides = config.kafka.consumer
        try:
            self._admin = AdminClient(self._client)
        except (KafkaException, ValueError, TypeError) as error:
            raise ConfigError(f"{config.path}: [kafka.client] {_reason(error)}") from None
        self._consumers: dict[str, Consumer] = {}
        self._has_controller = True

    def close(self) -> None:
        """Close every connection."""
        for consumer in self._consumers.values():
            consumer.close()
        self._consumers.clear()

    def topics(self) -> dict[str, int]:
        """Return the visible topics with their partition counts; raises BrokerError with the mend."""
        until = time.monotonic() + self._answer_s
        while True:
            try:
                metadata = self._admin.list_topics(timeout=1.0)
                self._has_controller = metadata.controller_id in metadata.brokers
                return {name: len(each.partitions) for name, each in metadata.topics.items()}
            except KafkaException as error:
                self._admin.poll(0)
                refused = [each for each in self._errors if each.code() in {*_LOGIN, KafkaError._SSL}]
                if refused or time.monotonic() > until:
                    raise self._error([*refused, *reversed(self._errors), error.args[0]][0]) from None

    def describe_topics(self, names: Sequence[str]) -> dict[str, TopicFacts]:
        """Return what the broker says of each topic, also of those that are missing or hidden."""
        if not names:
            return {}
        if not self._has_controller:
            # An embedded broker: it would be asked in vain for as long as the timeout allows.
            standing = self.topics()
            missing = TopicFacts(problem="does not exist")
            return {name: TopicFacts(standing[name]) if name in standing else missing for name in names}
        asked = self._admin.describe_topics(
            TopicCollection(list(names)), include_authorized_operations=True, request_timeout=self._answer_s
        )
        return {name: _topic_facts(future) for name, future in asked.items()}

    def describe_group(self, group: str) -> GroupFacts:
        """Return a group's members; raises BrokerError where this broker or this user may not tell."""
        asked = self._admin.describe_consumer_groups(
            [group], include_authorized_operations=True, request_timeout=self._answer_s
        )
        try:
            found = asked[group].result()
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return GroupFacts("EMPTY")
            raise BrokerError(f"group {group} cannot be described: {_reason(error)}") from None
        members = tuple(
            Member(
                each.client_id,
                each.host.lstrip("/"),
                tuple((part.topic, part.partition) for part in each.assignment.topic_partitions),
            )
            for each in found.members
        )
        return GroupFacts(found.state.name, members, _operations(found.authorized_operations))

    def positions(self, group: str, topics: Iterable[tuple[str, int]]) -> list[Position]:
        """Return how far ``group`` has come in each partition of ``topics`` (name, partition count)."""
        wanted = [TopicPartition(name, number) for name, count in topics for number in range(count)]
        if not wanted:
            return []
        consumer = self.consumer(group)
        committed = self._ask(lambda: consumer.committed(wanted, timeout=self._answer_s))
        positions = []
        for each in committed:
            if each.error is not None:
                raise self._error(each.error)
            low, end = self._ends(consumer, each)
            offset = each.offset if each.offset >= 0 else None
            positions.append(Position(each.topic, each.partition, offset, low, end))
        counted = self._counted(
            consumer, {(each.topic, each.partition): each for each in positions if 0 < each.lag <= TAIL}
        )
        return [each._replace(counted=counted.get((each.topic, each.partition))) for each in positions]

    @staticmethod
    def _counted(consumer: Consumer, near: dict[tuple[str, int], Position]) -> dict[tuple[str, int], int]:
        """Return how many records are left in these partitions; those that cannot be read are missing."""
        counted: dict[tuple[str, int], int] = {}
        left = dict.fromkeys(near, 0)
        if near:
            consumer.assign([TopicPartition(*place, position.next) for place, position in near.items()])
        until = time.monotonic() + TAIL_S
        while left and time.monotonic() < until:
            message = consumer.poll(0.1)
            place = ("", 0) if message is None else (message.topic() or "", message.partition() or 0)
            if message is None or place not in left:
                continue
            error, offset, end = message.error(), message.offset() or 0, near[place].end
            left[place] += error is None and offset < end
            if error is not None or offset + 1 >= end:
                count = left.pop(place)
                if error is None or error.code() == KafkaError._PARTITION_EOF:
                    counted[place] = count
        consumer.unassign()
        return counted

    def ends(self, group: str, topic: str, partition: int) -> tuple[int, int]:
        """Return the first offset that is still there and the one after the last."""
        return self._ends(self.consumer(group), TopicPartition(topic, partition))

    def _ends(self, consumer: Consumer, partition: TopicPartition) -> tuple[int, int]:
        low, end = self._ask(lambda: consumer.get_watermark_offsets(partition, timeout=self._answer_s))
        return low, end

    def consumer(self, group: str) -> Consumer:
        """Return a consumer that can look but never joins ``group``, commits, or creates a topic.

        It carries the group's name because a name of its own would need a right of its own.
        """
        if group not in self._consumers:
            self._consumers[group] = Consumer(
                {
                    **self._client,
                    # It reads to an end and stops: a broker need not wait there for more.
                    "fetch.wait.max.ms": 20,
                    **self._consumer_overrides,
                    "group.id": group,
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "enable.partition.eof": True,
                    "allow.auto.create.topics": False,
                    "auto.offset.reset": "error",
                    # A redrive that was broken off must not look like one that was done.
                    "isolation.level": "read_committed",
                }
            )
        return self._consumers[group]

    def create(self, topics: Iterable[tuple[str, int, int]]) -> set[str]:
        """Create topics (name, partitions, replication) and return those that did not stand already.

        Raises BrokerError for the first that fails.
        """
        new = [NewTopic(name, partitions, replication) for name, partitions, replication in topics]
        if not new:
            return set()
        self._need_controller(new[0].topic)
        created = set()
        for name, future in self._admin.create_topics(new, operation_timeout=self._answer_s).items():
            try:
                future.result()
                created.add(name)
            except KafkaException as error:
                # A topic just created, or one this user may not see, is missing in the metadata and stands.
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise BrokerError(f"topic {name} was not created: {_reason(error)}") from None
        self._wait_until_seen({each.topic for each in new})
        return created

    def _need_controller(self, topic: str) -> None:
        """Raise BrokerError where nobody creates topics: the request would wait a minute for a controller."""
        until = time.monotonic() + min(CONTROLLER_S, self._answer_s)
        while not self._has_controller:
            if time.monotonic() > until:
                raise BrokerError(
                    f"topic {topic} was not created: Kafka {self.address} has no controller; an embedded "
                    "broker creates no topics, a real one does "
                    "(`./scripts/demo --keep --real-kafka` starts one)"
                )
            time.sleep(0.1)
            self.topics()

    def _wait_until_seen(self, names: set[str]) -> None:
        """Wait until the metadata shows the topics: what comes next, a worker or doctor, reads it there."""
        until = time.monotonic() + self._answer_s
        while names - self.topics().keys() and time.monotonic() < until:
            time.sleep(0.05)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        until = time.monotonic() + self._answer_s
        while True:
            try:
                return question()
            except KafkaException as error:
                if error.args[0].code() not in _MOVING or time.monotonic() > until:
                    raise self._error(error.args[0]) from None
            time.sleep(0.1)

    def _error(self, error: KafkaError) -> BrokerError:
        return explained(self.address, error)


def explained(address: str, error: KafkaError) -> BrokerError:
    """Return the error that tells an operator what failed and what to look at."""
    code, reason = error.code(), _reason(error)
    if code in _LOGIN:
        return BrokerError(
            f"Kafka {address} refused the login: {reason}; check sasl.username, sasl.password and "
            "sasl.mechanism under [kafka.client]"
        )
    if code == KafkaError._SSL:
        return BrokerError(
            f"Kafka {address} failed at TLS: {reason}; check ssl.ca.location and security.protocol "
            "under [kafka.client]"
        )
    if code in _AWAY:
        return BrokerError(
            f"Kafka {address} does not answer: {reason}; check [kafka] bootstrap_servers, that the broker "
            "runs, and security.protocol under [kafka.client]"
        )
    return BrokerError(f"Kafka {address}: {reason}")


def _reason(error: object) -> str:
    if isinstance(error, KafkaException) and error.args:
        error = error.args[0]
    text = error.str() if isinstance(error, KafkaError) else str(error)
    return " ".join(text.split())


def _topic_facts(future: Any) -> TopicFacts:
    try:
        found = future.result()
    except KafkaException as error:
        code = error.args[0].code()
        if code == KafkaError.UNKNOWN_TOPIC_OR_PART:
            return TopicFacts(problem="does not exist")
        if code == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            return TopicFacts(problem="this user has no right on it, or it does not exist", denied=True)
        return TopicFacts(problem=_reason(error))
    return TopicFacts(len(found.partitions), _operations(found.authorized_operations))


def _operations(operations: Iterable[AclOperation] | None) -> frozenset[str]:
    return frozenset(each.name for each in operations or ())
