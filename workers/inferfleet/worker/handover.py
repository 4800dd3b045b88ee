"""Giving outcomes to the outlets: each with a receipt that counts for its settling."""

from __future__ import annotations

from collections.abc import Sequence

from inferfleet.addresses import REPLY, on_rabbitmq
from inferfleet.ports import Outlet, ResultOutlet
from inferfleet.records import Amqp, Chunk, Envelopes, Header, Results
from inferfleet.wire.stored import payload_hash
from inferfleet.worker.settling import EnvelopeReceipt, ResultReceipt, Settling


class HandOver:
    """The outlets of a worker, for whoever writes outcomes; owned by the worker loop's thread."""

    def __init__(self, outlet: Outlet, results: ResultOutlet | None) -> None:
        self._outlet = outlet
        self._results = results

    @property
    def stores(self) -> bool:
        """Whether there is a result store."""
        return self._results is not None

    def publish(self, settling: Settling, envelopes: Envelopes, rows: Sequence[int]) -> None:
        """Publish outcomes of the records ``rows``; ``settling`` waits for their confirmation."""
        self._outlet.publish(envelopes, EnvelopeReceipt(settling, envelopes, rows))

    def outcomes(
        self,
        settling: Settling,
        destinations: Sequence[str],
        rows: list[int],
        values: list[bytes],
        headers: list[list[Header]],
        *,
        reply: bool,
    ) -> None:
        """Publish one outcome a record to each destination; ``reply``: to the queue that it names, too."""
        plan, chunk = settling.plan, settling.chunk
        keys = [chunk.keys[row] for row in rows]
        for destination in destinations:
            carried = _correlation(chunk, rows) if on_rabbitmq(destination) else None
            self.publish(settling, Envelopes(destination, keys, values, headers, carried), rows)
        if reply and chunk.amqp is not None:
            asking = [i for i, row in enumerate(rows) if plan.may_reply(chunk.amqp[row])]
            if asking:
                envelopes = Envelopes(
                    REPLY,
                    [keys[i] for i in asking],
                    [values[i] for i in asking],
                    [headers[i] for i in asking],
                    [chunk.amqp[rows[i]] for i in asking],
                )
                self.publish(settling, envelopes, [rows[i] for i in asking])

    def store(
        self,
        settling: Settling,
        rows: list[int],
        ids: list[str],
        bodies: list[bytes],
        ok: list[bool],
        replies: list[str | None] | None,
        *,
        reply_only: bool = False,
    ) -> None:
        """Write results, or with ``reply_only`` the replies of waiting clients alone."""
        if self._results is None:
            return
        plan = settling.plan
        values = settling.chunk.values
        hashes: list[str] = [payload_hash(values[row] or b"") for row in rows]
        only = reply_only or not plan.redis
        results = Results(plan.name, ids, bodies, ok, hashes, replies, plan.ttl_s, only)
        self._results.publish(results, ResultReceipt(settling, results, rows))


def carried(chunk: Chunk, rows: Sequence[int]) -> list[Amqp] | None:
    """Return all that RabbitMQ messages had beside key, headers and body; one without a name gets its own."""
    if chunk.amqp is None:
        return None
    found = [(row, chunk.amqp[row]) for row in rows]
    return [a if a.message_id else a._replace(message_id=chunk.called(row)) for row, a in found]


def _correlation(chunk: Chunk, rows: Sequence[int]) -> list[Amqp] | None:
    """Return what an answer repeats of its request: the caller's own correlation id."""
    if chunk.amqp is None:
        return None
    return [Amqp(correlation_id=chunk.amqp[row].correlation_id) for row in rows]
