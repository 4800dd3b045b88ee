"""The last steps of a consumer-group member before it is closed: hear what the group still has to tell.

News of a rebalance that librdkafka tells from inside ``close`` can wait for a thread that has ended already,
for ever and with Python's lock held, so that no signal and no timer of this process is heard any more (seen
with librdkafka 2.16: ``rd_kafka_rebalance_protocol`` below ``rd_kafka_consumer_close``). Where nothing is
left to tell, a close has nothing to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
from confluent_kafka import Consumer, KafkaException

log = structlog.get_logger(__name__)

LEAVE_S = 5.0
_LISTEN_S = 0.05
_QUIET = 2


def leave(consumer: Consumer, told: Callable[[], int], *, stays: bool) -> None:
    """Give up all partitions and return when the group has nothing more to tell, within :data:`LEAVE_S`.

    ``told`` says how often news has been heard. A static member (``stays``) keeps its place in the group
    (KIP-345), so it only stops fetching: it may be back before anybody has noticed.
    """
    try:
        if stays:
            consumer.pause(consumer.assignment())
        else:
            consumer.unsubscribe()
        until, quiet = time.monotonic() + LEAVE_S, 0
        while quiet < _QUIET and time.monotonic() < until:
            before = told()
            message = consumer.poll(_LISTEN_S)
            calm = message is None and told() == before and (stays or not consumer.assignment())
            quiet = quiet + 1 if calm else 0
    except KafkaException as error:
        log.warning("leave_failed", error=str(error))
