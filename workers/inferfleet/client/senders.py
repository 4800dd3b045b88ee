"""The senders of one client: each broker's is started when a message first needs it."""

from __future__ import annotations

import threading
import time

from inferfleet.addresses import on_rabbitmq
from inferfleet.client.sender import Failed, Message, Replied, Sender
from inferfleet.client.session import Session


class Senders:
    """A :class:`~inferfleet.client.sender.Sender` that chooses another by the message's address."""

    def __init__(self, session: Session, failed: Failed, replied: Replied) -> None:
        self._session = session
        self._failed = failed
        self._replied = replied
        self._lock = threading.Lock()
        self._started: dict[bool, Sender] = {}

    def send(self, message: Message, timeout_s: float = 30.0) -> None:
        """Hand over; waits up to ``timeout_s`` while the sender is full. Raises SubmitError."""
        self._for(message).send(message, timeout_s)

    def try_send(self, message: Message) -> bool:
        """Hand over without waiting; false while the sender is full. Raises SubmitError."""
        return self._for(message).try_send(message)

    def flush(self, timeout_s: float) -> None:
        """Wait until everything handed over is delivered. Raises SubmitError if something is not."""
        until = time.monotonic() + timeout_s
        for sender in self._all():
            sender.flush(max(0.0, until - time.monotonic()))

    def close(self, timeout_s: float) -> int:
        """Deliver what is left within ``timeout_s`` and end; return how many stay undelivered."""
        until = time.monotonic() + timeout_s
        return sum([sender.close(max(0.0, until - time.monotonic())) for sender in self._all()])

    def _all(self) -> list[Sender]:
        with self._lock:
            return list(self._started.values())

    def _for(self, message: Message) -> Sender:
        with self._lock:
            rabbitmq = on_rabbitmq(message.topic)
            if rabbitmq not in self._started:
                self._started[rabbitmq] = self._start(rabbitmq)
            return self._started[rabbitmq]

    def _start(self, rabbitmq: bool) -> Sender:
        session = self._session
        if rabbitmq:
            from inferfleet.client.rabbitmq_sender import RabbitSender

            return RabbitSender(session.amqp(), f"{session.fleet} client", self._failed, self._replied)
        from inferfleet.client.kafka_sender import KafkaSender, producer_properties

        return KafkaSender(producer_properties(session.kafka), self._failed)
