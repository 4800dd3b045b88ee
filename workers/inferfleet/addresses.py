"""Where requests come from and outcomes go, as one string each.

A Kafka topic is its plain name, which cannot hold a colon. A RabbitMQ source is ``rabbitmq:QUEUE``, a
RabbitMQ destination ``rabbitmq:EXCHANGE/ROUTING_KEY`` (the default exchange has no name, so a queue is
``rabbitmq:/QUEUE``), and ``reply:`` is the queue that each request names itself.
"""

from __future__ import annotations

RABBITMQ = "rabbitmq:"
REPLY = "reply:"


def on_rabbitmq(address: str) -> bool:
    """Return whether an address belongs to RabbitMQ; a request's own reply queue does."""
    return address.startswith((RABBITMQ, REPLY))


def rabbitmq_source(queue: str) -> str:
    """Return the source that a queue is."""
    return RABBITMQ + queue


def to_queue(queue: str) -> str:
    """Return the destination that reaches a queue by its name."""
    return f"{RABBITMQ}/{queue}"


def plain(source: str) -> str:
    """Return the name of a source's topic or queue."""
    return source.removeprefix(RABBITMQ)


def exchange_and_key(destination: str) -> tuple[str, str]:
    """Return exchange and routing key of a RabbitMQ destination; an exchange's name holds no slash."""
    exchange, _, key = destination.removeprefix(RABBITMQ).partition("/")
    return exchange, key
