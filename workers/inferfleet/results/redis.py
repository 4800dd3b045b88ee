"""Writes results to Redis: once, then the reply to the client that waits; never blocks the worker loop.

One daemon thread owns the connection. It takes what was published, writes it in wide atomic steps, and tries
a step again until it succeeds: the store's being away is never a refusal. News come back through a queue that
:meth:`RedisResults.poll` empties on the worker loop's thread.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import structlog

from inferfleet.ports import Receipt, Refusal, RefusalKind
from inferfleet.records import Results
from inferfleet.results.failures import Trouble, diagnose
from inferfleet.results.recall import Lost, Recall
from inferfleet.results.scripts import REPLY, WRITE
from inferfleet.results.servers import Servers, servers_of
from inferfleet.results.steps import Group, Step, steps_of
from inferfleet.wire.stored import Verdict, duplicate_text

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OutletOptions:
    """How the outlet works.

    A *step* is what is written and confirmed together: one atomic write on a single server, where its size
    bounds how long other callers wait; on a cluster one atomic write for each row, sent side by side. The
    last ``recall_ids`` results of ``recall_s`` are looked for again in a store that was connected anew.
    """

    reply_max_len: int = 10_000
    rows_per_step: int = 200
    bytes_per_step: int = 4_194_304
    backoff_first_s: float = 0.05
    backoff_max_s: float = 2.0
    log_every_s: float = 30.0
    recall_ids: int = 20_000
    recall_s: float = 60.0


class _News(NamedTuple):
    """What became of a slice: rows that are durable, how many of them stood before, and rows refused."""

    receipt: Receipt
    route: str
    confirmed: int
    stood: int
    refused: list[tuple[int, Refusal]]


class RedisResults:
    """A :class:`~inferfleet.ports.ResultOutlet` over Redis or Valkey, single, behind sentinels or a cluster.

    ``connect`` returns a client that answers with bytes and does not retry; it is called on the outlet's
    thread, and again where that client finds no server any more. ``wake`` is called on that thread when there
    is news. In ``poll``, ``stood`` is told how many rows of a route stood already, and ``lost`` how many
    results of a route Redis had confirmed and did not have any more when it was connected anew.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        fleet: str,
        *,
        wake: Callable[[], None],
        stood: Callable[[str, int], None] | None = None,
        lost: Callable[[str, int], None] | None = None,
        options: OutletOptions | None = None,
    ) -> None:
        self._connect = connect
        self._fleet = fleet
        self._wake = wake
        self._tell_stood = stood
        self._tell_lost = lost
        self._options = options or OutletOptions()
        self._servers: Servers | None = None
        self._renew = False
        self._recall = Recall(fleet, self._options.recall_ids, self._options.recall_s)
        self._connected_anew = False
        self._inbox: SimpleQueue[Group | None] = SimpleQueue()
        self._news: SimpleQueue[_News | Lost] = SimpleQueue()
        self._arrived = threading.Event()
        self._stop = threading.Event()
        self._pending = 0
        self._closed = False
        self._away_since: float | None = None
        self._trouble: Trouble | None = None
        self._logged_at = float("-inf")
        self._tries = 0
        self._random = random.Random()
        self._thread = threading.Thread(target=self._serve, name="redis-results", daemon=True)
        self._thread.start()

    @property
    def away_since(self) -> float | None:
        """Monotonic time since when the store does not accept writes; ``None`` while it does."""
        return self._away_since

    def publish(self, results: Results, receipt: Receipt) -> None:
        """Hand over without waiting."""
        if self._closed:
            raise RuntimeError("the result outlet is closed")
        self._pending += len(results)
        self._inbox.put(Group(results, receipt))

    def poll(self) -> None:
        """Deliver confirmations and refusals that have arrived."""
        while True:
            try:
                news = self._news.get_nowait()
            except Empty:
                return
            if isinstance(news, Lost):
                if self._tell_lost is not None:
                    for route, count in news.by_route.items():
                        self._tell_lost(route, count)
                continue
            self._pending -= news.confirmed + len(news.refused)
            if news.stood and self._tell_stood is not None:
                self._tell_stood(news.route, news.stood)
            for index, refusal in news.refused:
                news.receipt.refused(index, refusal)
            if news.confirmed:
                news.receipt.confirmed(news.confirmed)

    def pending(self) -> int:
        """Results handed over and not yet confirmed or refused."""
        return self._pending

    def close(self, timeout_s: float) -> int:
        """Wait up to ``timeout_s`` for what is pending; return how many stay unconfirmed."""
        ends_at = time.monotonic() + timeout_s
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
        self.poll()
        while self._pending and (left := ends_at - time.monotonic()) > 0:
            self._arrived.wait(left)
            self._arrived.clear()
            self.poll()
        self._stop.set()
        if self._pending:
            # The thread may sit in a read; without its connection it ends at once.
            self._drop()
        self._thread.join(max(0.1, ends_at - time.monotonic()))
        self.poll()
        return self._pending

    def _serve(self) -> None:
        while True:
            groups, last = self._take()
            for step in steps_of(groups, self._options.rows_per_step, self._options.bytes_per_step):
                if not self._finish(step):
                    return
            if last:
                self._drop()
                return

    def _take(self) -> tuple[list[Group], bool]:
        """Wait for the first group; return all that arrived behind it too, and whether that was the end."""
        groups: list[Group] = []
        group = self._inbox.get()
        while group is not None:
            groups.append(group)
            try:
                group = self._inbox.get_nowait()
            except Empty:
                return groups, False
        return groups, True

    def _finish(self, step: Step) -> bool:
        """Try ``step`` until it is done; false if the outlet was stopped before."""
        begun_at = time.monotonic()
        while not self._stop.is_set():
            try:
                servers = self._open()
                self._write(servers, step)
                self._reply(servers, step)
                if self._connected_anew:
                    self._look_back(servers)
            except Exception as error:
                self._went_wrong(error)
                continue
            self._went_well()
            self._report(step, begun_at)
            return True
        return False

    def _open(self) -> Servers:
        """Return the servers, connected anew if the last trouble may mean others."""
        if self._servers is None:
            self._servers = servers_of(self._connect(), self._on_connect)
        elif self._renew:
            try:
                self._servers.renew()
            except Exception:
                self._drop()
                raise
        self._renew = False
        return self._servers

    def _on_connect(self) -> None:
        self._connected_anew = True

    def _write(self, servers: Servers, step: Step) -> None:
        writes = step.writes(self._fleet, joined=servers.joins_keys)
        replies = servers.run(WRITE, [write.call for write in writes])
        step.written(writes, replies)
        _raise_first(replies)

    def _reply(self, servers: Servers, step: Step) -> None:
        calls = step.replies(self._fleet, self._options.reply_max_len)
        answers = servers.run(REPLY, list(calls.values()))
        for stream, answer in zip(calls, answers, strict=True):
            if not isinstance(answer, Exception):
                step.replied(stream)
        _raise_first(answers)

    def _look_back(self, servers: Servers) -> None:
        """Count what was confirmed over earlier connections and does not stand now, and say so."""
        lost = self._recall.look_back(servers, time.monotonic())
        self._connected_anew = False
        if lost.rows:
            some = [request_id for _, request_id in lost.rows[:10]]
            by_route = [f"{route}={count}" for route, count in lost.by_route.items()]
            log.error(
                "results_lost", lost=len(lost.rows), checked=lost.checked, lost_by_route=by_route, ids=some
            )
            self._news.put(lost)

    def _report(self, step: Step, begun_at: float) -> None:
        first = 0
        for results, receipt, low, high in step.slices:
            ids = results.ids[low:high]
            refused: list[tuple[int, Refusal]] = []
            stood = 0
            if step.verdicts:
                told = [step.verdict_of(row) for row in range(first, first + high - low)]
                for index, verdict in enumerate(told, low):
                    if verdict is Verdict.OTHER_PAYLOAD:
                        text = duplicate_text(results.ids[index])
                        refused.append((index, Refusal(RefusalKind.DUPLICATE_ID, text)))
                ids = [each for each, verdict in zip(ids, told, strict=True) if verdict is Verdict.WRITTEN]
                stood = high - low - len(ids) - len(refused)
            if step.stores:
                self._recall.note(results.route, ids, results.ttl_s, begun_at)
            self._news.put(_News(receipt, results.route, high - low - len(refused), stood, refused))
            first += high - low
        self._arrived.set()
        self._wake()

    def _went_wrong(self, error: Exception) -> None:
        """Note the trouble, let go of a connection that may be the reason, and wait before the next try."""
        trouble = diagnose(error)
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        if trouble != self._trouble or now - self._logged_at >= self._options.log_every_s:
            log.warning("results_away", reason=trouble.reason, error=str(error), kind=type(error).__name__)
            self._trouble, self._logged_at = trouble, now
        if trouble.reconnect:
            self._renew = True
        options = self._options
        delay_s = min(options.backoff_max_s, options.backoff_first_s * 2.0 ** min(self._tries, 16))
        self._tries += 1
        self._stop.wait(delay_s * self._random.uniform(0.5, 1.0))

    def _went_well(self) -> None:
        if self._away_since is not None:
            log.info("results_back", away_s=round(time.monotonic() - self._away_since, 3), tries=self._tries)
            self._away_since, self._trouble, self._tries = None, None, 0

    def _drop(self) -> None:
        servers, self._servers = self._servers, None
        if servers is None:
            return
        try:
            servers.close()
        except Exception as error:
            log.debug("results_drop_failed", error=str(error))


def _raise_first(replies: list[Any]) -> None:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
