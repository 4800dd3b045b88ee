"""Numbered results through the real Redis outlet, and what became of each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from inferfleet.ports import Refusal
from inferfleet.records import Results
from inferfleet.redis_access import Place, open_redis
from inferfleet.results.redis import OutletOptions, RedisResults
from inferfleet.wire.stored import again_key, payload_hash, reply_key, result_key
from tests.support.waiting import wait_until

FLEET, ROUTE = "faults", "digits"
OPTIONS = OutletOptions(rows_per_step=20, backoff_first_s=0.02, backoff_max_s=0.2)


class Receipts:
    """Counts confirmations; a refusal fails the test, because no request here is at fault."""

    def __init__(self) -> None:
        self.confirmed_rows = 0

    def confirmed(self, count: int) -> None:
        """Count them."""
        self.confirmed_rows += count

    def refused(self, index: int, refusal: Refusal) -> None:
        """Fail."""
        raise AssertionError(f"row {index} was refused: {refusal}")


class Writer:
    """Publishes numbered results to ``place`` and knows how many were confirmed."""

    def __init__(self, place: Place, *, options: OutletOptions = OPTIONS) -> None:
        self.place = place
        self.lost: Counter[str] = Counter()
        """What the outlet said was lost, by route."""
        self.outlet = RedisResults(
            lambda: open_redis(place),
            FLEET,
            wake=lambda: None,
            lost=lambda route, count: self.lost.update({route: count}),
            options=options,
        )
        self.receipts = Receipts()
        self.published = 0

    def publish(self, count: int, *, body_bytes: int = 0, reply: str | None = None) -> None:
        """Publish the next ``count`` numbers."""
        self.publish_again(range(self.published, self.published + count), body_bytes=body_bytes, reply=reply)

    def publish_again(self, numbers: Sequence[int], *, body_bytes: int = 0, reply: str | None = None) -> None:
        """Publish these numbers, perhaps not for the first time; equal numbers have equal bodies."""
        bodies = [json.dumps({"model_name": "m", "n": n, "pad": "x" * body_bytes}).encode() for n in numbers]
        ids = [f"r-{n}" for n in numbers]
        hashes = [payload_hash(id_.encode()) for id_ in ids]
        replies: list[str | None] | None = None if reply is None else [reply] * len(ids)
        group = Results(ROUTE, ids, bodies, [True] * len(ids), hashes, replies, 600)
        self.outlet.publish(group, self.receipts)
        self.published += len(ids)

    @property
    def done(self) -> bool:
        """Whether everything published is confirmed."""
        self.outlet.poll()
        return self.receipts.confirmed_rows == self.published

    def wait_done(self, what: str, timeout_s: float = 20.0) -> None:
        """Return once everything is confirmed."""
        wait_until(lambda: self.done, timeout_s, what)

    def wait_confirmed(self, more: int, timeout_s: float = 20.0) -> None:
        """Return once ``more`` further rows are confirmed."""
        goal = self.receipts.confirmed_rows + more

        def enough() -> bool:
            self.outlet.poll()
            return self.receipts.confirmed_rows >= goal

        wait_until(enough, timeout_s, f"{more} more rows are confirmed")

    def wait_away(self) -> None:
        """Return once the outlet says that Redis is away."""
        wait_until(lambda: self.outlet.away_since is not None, 10, "the outlet says that Redis is away")


def missing(client: Any, count: int) -> list[int]:
    """Return the numbers below ``count`` whose result does not stand with its own value."""
    with client.pipeline(transaction=False) as pipe:
        for number in range(count):
            pipe.get(result_key(FLEET, ROUTE, f"r-{number}"))
        bodies = pipe.execute()
    return [n for n, body in enumerate(bodies) if body is None or json.loads(body)["n"] != n]


def repeats(client: Any, count: int) -> Counter[str]:
    """Return the sum of the counters of all numbers below ``count``."""
    with client.pipeline(transaction=False) as pipe:
        for number in range(count):
            pipe.hgetall(again_key(FLEET, ROUTE, f"r-{number}"))
        found = pipe.execute()
    total: Counter[str] = Counter()
    for counts in found:
        total.update({field.decode(): int(value) for field, value in counts.items()})
    return total


def replied(client: Any, name: str) -> set[str]:
    """Return the ids in a reply stream."""
    return {fields[b"id"].decode() for _, fields in client.xrange(reply_key(FLEET, name))}
