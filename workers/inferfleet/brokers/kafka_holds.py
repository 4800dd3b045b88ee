"""Which partitions a consumer must not fetch from: those of paused topics, and those that are deferred."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import TypeAlias

from confluent_kafka import Consumer, KafkaException, TopicPartition

Where: TypeAlias = tuple[str, int]


class Holds:
    """Pauses partitions for two reasons that know nothing of each other; each is fetched when both are over.

    ``owned`` is a live view of the assignment. Called on the consumer's own thread.
    """

    def __init__(self, consumer: Consumer, owned: Collection[Where]) -> None:
        self._consumer = consumer
        self._owned = owned
        self._topics: set[str] = set()
        self._until: dict[Where, float] = {}
        self._sought: dict[Where, int] = {}
        self._went_paused: set[Where] = set()

    def __repr__(self) -> str:
        return f"Holds(topics={sorted(self._topics)}, deferred={sorted(self._until)})"

    def pause(self, topics: Collection[str]) -> None:
        """Stop fetching from these topics."""
        self._topics |= set(topics)
        _tell(self._consumer.pause, [where for where in self._owned if where[0] in topics])

    def resume(self, topics: Collection[str]) -> None:
        """Fetch from these topics again, but for what is deferred."""
        self._topics -= set(topics)
        mine = [where for where in self._owned if where[0] in topics and where not in self._until]
        _tell(self._consumer.resume, mine)

    def defer(self, where: Where, position: int, until_s: float) -> None:
        """Go back to ``position`` and stop fetching until then. Raises KafkaException.

        The client forgets what it has fetched ahead, and what it gave out since.
        """
        partition = TopicPartition(*where, position)
        self._consumer.pause([partition])
        self._consumer.seek(partition)
        self._until[where] = until_s
        self._sought[where] = position

    def due(self, now: float) -> float | None:
        """Fetch again what was deferred until ``now``; return when the next one is due, if any."""
        if not self._until:
            return None
        due = [where for where, until_s in self._until.items() if until_s <= now]
        for where in due:
            del self._until[where]
        free = [where for where in due if where[0] not in self._topics]
        _tell(self._consumer.resume, free)
        for where in free:
            # It goes on there anyway; told once more, the client's fetcher wakes: it may sleep for a second.
            with suppress(KafkaException):
                self._consumer.seek(TopicPartition(*where, self._sought[where]))
        return min(self._until.values(), default=None)

    @property
    def deferred(self) -> bool:
        """Whether any partition waits for its time."""
        return bool(self._until)

    def sought(self, where: Where) -> int:
        """Return where a partition goes on that nothing was taken from since it was deferred; else -1."""
        return self._sought.get(where, -1)

    def assigned(self, partitions: Iterable[Where]) -> None:
        """Hold back what belongs to a paused topic, and nothing else.

        The client remembers a pause over a loss of the partition: what went while it was paused comes so.
        """
        held = [where for where in partitions if where[0] in self._topics]
        free = [where for where in partitions if where in self._went_paused and where not in held]
        self._went_paused.difference_update(free)
        _tell(self._consumer.pause, held)
        _tell(self._consumer.resume, free)

    def forgotten(self, partitions: Iterable[Where]) -> None:
        """Forget what was deferred of partitions that are taken away."""
        for where in partitions:
            if where[0] in self._topics or where in self._until:
                self._went_paused.add(where)
            self._until.pop(where, None)
            self._sought.pop(where, None)


def _tell(change: Callable[[list[TopicPartition]], None], partitions: list[Where]) -> None:
    if partitions:
        change([TopicPartition(*where) for where in partitions])
