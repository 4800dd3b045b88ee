"""Sends dead letters of a Kafka topic back through their pool's shortest retry topic, never one twice.

Retry records and the mark that they were sent go in one transaction: both stand, or none. Whoever starts a
redrive of a route takes its transactional id, so the one before can send nothing more, and what that one has
sent is marked before the new one begins.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from inferfleet.brokers.kafka_outlet import producer_properties
from inferfleet.cli.deadletters import DeadLetters, Found, mark
from inferfleet.cli.kafka import explained
from inferfleet.cli.letters import DeadLetter, redriven_headers
from inferfleet.cli.pace import Pace
from inferfleet.config import Config, kafka_client_config
from inferfleet.errors import BrokerError, ConfigError
from inferfleet.naming import redrive_id
from inferfleet.routes import Route

BATCH_BYTES = 4_000_000
TRANSACTION_S = 15
"""How long the broker keeps a transaction whose operator is gone; until then readers of retries wait."""
_ANSWER_S = 20.0
_ATTEMPTS = 3
"""The batch behind one that was too large has the wrong number, and is refused once for that."""
_TOO_LARGE = (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG_SIZE, KafkaError.RECORD_LIST_TOO_LARGE)
_FENCED = (
    KafkaError._FENCED,
    KafkaError.INVALID_PRODUCER_EPOCH,
    KafkaError.PRODUCER_FENCED,
    KafkaError.INVALID_PRODUCER_ID_MAPPING,
)


class Redrive:
    """One redrive of a route. Close it."""

    def __init__(self, config: Config, route: Route, letters: DeadLetters, topic: str) -> None:
        self.refused: dict[str, str] = {}
        """Why letters could not go, by place."""
        self._address = config.kafka.bootstrap_servers
        self._route = route
        self._letters = letters
        self._topic = topic
        self._id = redrive_id(config, route)
        largest = max(config.limits.max_result_bytes, config.limits.max_request_bytes) + 131_072
        properties = producer_properties(kafka_client_config(config), config.kafka.producer, largest)
        properties |= {
            "transactional.id": self._id,
            "transaction.timeout.ms": TRANSACTION_S * 1000,
            "message.timeout.ms": TRANSACTION_S * 1000 - 5000,
            "error_cb": lambda _: None,  # what matters of it is raised
            "log_level": 0,
        }
        try:
            self._producer = Producer(properties)
        except KafkaException as error:
            raise ConfigError(f"{config.path}: [kafka.producer] {error.args[0].str()}") from None

    def send(self, found: Found, pace: Pace, told: Callable[[int], None]) -> int:
        """Send what was found, but for what has been redriven since, and return how many went.

        ``told`` hears after each batch how many have gone. Raises BrokerError; what had gone is marked.
        """
        count = 0
        self._ask(lambda: self._producer.init_transactions(_ANSWER_S))
        # From here on nobody else can mark letters of this route.
        since = self._letters.redriven_since(found.ends)
        places = [place for place in found.places if place not in since]
        try:
            for batch in batches(self._letters.letters(places), pace.batch):
                count += self._send(batch)
                told(count)
                time.sleep(pace.delay_s(count))
        except BrokerError as error:
            raise BrokerError(f"{error} (sent before that: {count}; they will not be sent again)") from None
        return count

    def close(self) -> None:
        """Leave nothing open on the broker."""
        with contextlib.suppress(KafkaException):
            self._producer.abort_transaction(2.0)

    def _send(self, batch: list[DeadLetter], attempt: int = 1) -> int:
        """Send a batch in one transaction; one that holds a letter too large is halved."""
        self._ask(self._producer.begin_transaction)
        failures: list[KafkaError] = []

        def delivered(error: KafkaError | None, _: object) -> None:
            if error is not None:
                failures.append(error)

        offsets: dict[int, list[int]] = defaultdict(list)
        now_ms = time.time_ns() // 1_000_000
        try:
            for letter in batch:
                headers = redriven_headers(letter, now_ms)
                self._produce(self._topic, letter.body, letter.key, headers, delivered)
                offsets[letter.partition].append(letter.offset)
            for number, marked in offsets.items():
                value, headers = mark(marked)  # type: ignore[assignment]  # a header may have no value
                self._produce(self._letters.topic, value, None, headers, delivered, partition=number)
            self._commit()
        except KafkaException as error:
            return self._failed(batch, attempt, failures, error.args[0])
        return len(batch)

    def _produce(
        self, topic: str, value: bytes, key: bytes | None, headers: Any, told: Any, **more: int
    ) -> None:
        until = time.monotonic() + _ANSWER_S
        while True:
            try:
                self._producer.produce(topic, value, key, headers=headers, on_delivery=told, **more)
            except BufferError:
                if time.monotonic() > until:
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT)) from None
                self._producer.poll(0.1)
            else:
                return

    def _commit(self) -> None:
        try:
            self._producer.commit_transaction(_ANSWER_S)
        except KafkaException as error:
            if not error.args[0].retriable():
                raise
            self._producer.commit_transaction(_ANSWER_S)

    def _failed(
        self, batch: list[DeadLetter], attempt: int, failures: list[KafkaError], error: KafkaError
    ) -> int:
        """Abort, which undoes the batch, and send it again: in halves where it was too large."""
        large = next((each for each in (*failures, error) if each.code() in _TOO_LARGE), None)
        if error.fatal() or (large is None and (attempt == _ATTEMPTS or not error.txn_requires_abort())):
            raise self._explained(error)
        self._ask(lambda: self._producer.abort_transaction(_ANSWER_S))
        if large is None:
            return self._send(batch, attempt + 1)
        if len(batch) == 1:
            self.refused[batch[0].place] = f"{self._topic} does not take it: {large.str()}"
            return 0
        half = len(batch) // 2
        return self._send(batch[:half]) + self._send(batch[half:])

    def _ask(self, question: Callable[[], object]) -> None:
        try:
            question()
        except KafkaException as error:
            raise self._explained(error.args[0]) from None

    def _explained(self, error: KafkaError) -> BrokerError:
        if error.code() in _FENCED:
            return BrokerError(f"another redrive of route {self._route.name} has taken over")
        if error.code() == KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
            return BrokerError(
                f"Kafka {self._address}: this user may not write as transactional id {self._id}; "
                "`inferfleet topics plan --format acls` prints the rights"
            )
        return explained(self._address, error)


def batches(
    letters: Iterable[DeadLetter], most: int, most_bytes: int = BATCH_BYTES
) -> Iterator[list[DeadLetter]]:
    """Yield the letters in lists of at most ``most`` and ``most_bytes``; one that is larger goes alone."""
    batch: list[DeadLetter] = []
    size = 0
    for letter in letters:
        if batch and (len(batch) == most or size + len(letter.body) > most_bytes):
            yield batch
            batch, size = [], 0
        batch.append(letter)
        size += len(letter.body)
    if batch:
        yield batch
