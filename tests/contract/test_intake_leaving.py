"""A Kafka member that closes while its group moves: again and again, because it depends on the instant.

librdkafka alone repeats what was settled, ends the process by an assertion, or hangs with Python's lock
held, each in some of these closes (``brokers/kafka_leaving.py``).
"""

from __future__ import annotations

import pytest

from tests.contract.intake_bench import KafkaBench, Sent
from tests.support.kafka_server import KafkaServer

pytestmark = pytest.mark.service
ROUNDS = 6


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_member_that_closes_as_another_joins_commits_first(kafka: KafkaServer, protocol: str) -> None:
    """The one that joins has just been answered; the owner may not have heard of it yet."""
    for _ in range(ROUNDS):
        _owner_closes_as_another_joins(KafkaBench(kafka, protocol))


def _owner_closes_as_another_joins(bench: KafkaBench) -> None:
    topic = bench.topic()
    bench.send(topic, 0, *(Sent(b"v%d" % number) for number in range(5)))
    owner = bench.join(topic)
    bench.until_taken(owner, 5)
    joining = bench.join(topic)
    bench.until(lambda: joining.intake.joined, "the other one is a member")
    owner.to_settle = bench.first(3, owner, topic)
    owner.close()
    bench.until_taken(joining, 2)
    assert joining.values() == [b"v3", b"v4"]
    bench.close()
