"""Writes results to Redis: once, then the reply to the client that waits; never blocks the worker loop.

One daemon thread owns the connection. It takes what was published, writes it in wide atomic steps, and tries
a step again until it succeeds: the store's being away is never a refusal. News come back through a queue that
:meth:`RedisResults.poll` empties on the worker loop's thread.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import structlog
from redis.exceptions import NoScriptError

from inferfleet.ports import Receipt, Refusal, RefusalKind
from inferfleet.records import Results
from inferfleet.results.failures import Trouble, diagnose
from inferfleet.results.scripts import REPLY, WRITE, Script
from inferfleet.wire.stored import Verdict, duplicate_text, is_error, mark, reply_key, result_key

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OutletOptions:
    """How the outlet works.

    A *step* is one atomic write on the server; its size bounds how long other callers wait for the server.
    ``rows_per_step`` must be 1 on a cluster, where the keys of one step share one slot.
    """

    reply_max_len: int = 10_000
    rows_per_step: int = 200
    bytes_per_step: int = 4_194_304
    backoff_first_s: float = 0.05
    backoff_max_s: float = 2.0
    log_every_s: float = 30.0


class _Group(NamedTuple):
    results: Results
    receipt: Receipt


class _Slice(NamedTuple):
    """Rows ``low`` to ``high`` (exclusive) of one published group."""

    results: Results
    receipt: Receipt
    low: int
    high: int


class _News(NamedTuple):
    """What became of a slice: rows that are durable, how many of them stood before, and rows refused."""

    receipt: Receipt
    route: str
    confirmed: int
    stood: int
    refused: list[tuple[int, Refusal]]


@dataclass(slots=True)
class _Reply:
    """One entry of a client's reply stream."""

    stream: str
    fields: tuple[str, str, str, bytes]
    ttl_s: int


@dataclass(slots=True)
class _Step:
    """Slices that are written together; remembers what is done, so that a new try repeats no more."""

    slices: list[_Slice]
    verdicts: dict[int, tuple[Verdict, bytes]] | None = None
    replies: dict[str, list[_Reply]] | None = None

    @property
    def first(self) -> Results:
        """The group that names the lifetime and the kind for all."""
        return self.slices[0].results

    def rows(self) -> Iterator[tuple[Results, int]]:
        """Yield each row's group and index, in order."""
        for results, _, low, high in self.slices:
            for index in range(low, high):
                yield results, index


class RedisResults:
    """A :class:`~inferfleet.ports.ResultOutlet` over Redis or Valkey.

    ``connect`` returns a client that answers with bytes and does not retry; it is called on the outlet's
    thread, again after each trouble that may mean another server. ``wake`` is called on that thread when
    there is news. ``stood`` is told, in ``poll``, how many rows of a route stood already.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        fleet: str,
        *,
        wake: Callable[[], None],
        stood: Callable[[str, int], None] | None = None,
        options: OutletOptions | None = None,
    ) -> None:
        self._connect = connect
        self._fleet = fleet
        self._wake = wake
        self._tell_stood = stood
        self._options = options or OutletOptions()
        self._client: Any = None
        self._inbox: SimpleQueue[_Group | None] = SimpleQueue()
        self._news: SimpleQueue[_News] = SimpleQueue()
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
        self._inbox.put(_Group(results, receipt))

    def poll(self) -> None:
        """Deliver confirmations and refusals that have arrived."""
        while True:
            try:
                news = self._news.get_nowait()
            except Empty:
                return
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
            for step in self._steps(groups):
                if not self._finish(step):
                    return
            if last:
                self._drop()
                return

    def _take(self) -> tuple[list[_Group], bool]:
        """Wait for the first group; return all that arrived behind it too, and whether that was the end."""
        groups: list[_Group] = []
        group = self._inbox.get()
        while group is not None:
            groups.append(group)
            try:
                group = self._inbox.get_nowait()
            except Empty:
                return groups, False
        return groups, True

    def _steps(self, groups: list[_Group]) -> Iterator[_Step]:
        """Cut and join groups into steps of bounded rows and bytes, equal in lifetime and kind."""
        options = self._options
        slices: list[_Slice] = []
        rows = size = 0
        for results, receipt in groups:
            if slices and (results.ttl_s, results.reply_only) != (
                slices[0].results.ttl_s,
                slices[0].results.reply_only,
            ):
                yield _Step(slices)
                slices, rows, size = [], 0, 0
            low = 0
            for index, body in enumerate(results.bodies):
                if rows and (rows == options.rows_per_step or size + len(body) > options.bytes_per_step):
                    if low < index:
                        slices.append(_Slice(results, receipt, low, index))
                    yield _Step(slices)
                    slices, rows, size, low = [], 0, 0, index
                rows += 1
                size += len(body)
            if low < len(results):
                slices.append(_Slice(results, receipt, low, len(results)))
        if slices:
            yield _Step(slices)

    def _finish(self, step: _Step) -> bool:
        """Try ``step`` until it is done; false if the outlet was stopped before."""
        while not self._stop.is_set():
            try:
                if step.verdicts is None:
                    step.verdicts = {} if step.first.reply_only else self._write(step)
                if step.replies is None:
                    step.replies = self._replies(step, step.verdicts)
                while step.replies:
                    stream = next(iter(step.replies))
                    self._reply(stream, step.replies[stream])
                    del step.replies[stream]
            except Exception as error:
                self._went_wrong(error)
                continue
            self._went_well()
            self._report(step, step.verdicts)
            return True
        return False

    def _write(self, step: _Step) -> dict[int, tuple[Verdict, bytes]]:
        """Write the step's rows at once; return what became of those that do not stand now."""
        fleet = self._fleet
        keys: list[str] = []
        bodies: list[bytes] = []
        wanted = ""
        for results, _, low, high in step.slices:
            prefix = result_key(fleet, results.route, "")
            keys += [prefix + request_id for request_id in results.ids[low:high]]
            bodies += map(mark, results.bodies[low:high], results.payload_hashes[low:high])
            replies = results.replies
            wanted += (
                "0" * (high - low)
                if replies is None
                else "".join(["1" if reply else "0" for reply in replies[low:high]])
            )
        news = self._run(WRITE, keys, [step.first.ttl_s * 1000, wanted, *bodies])
        return {news[at] - 1: (Verdict(news[at + 1]), news[at + 2]) for at in range(0, len(news), 3)}

    def _replies(self, step: _Step, verdicts: dict[int, tuple[Verdict, bytes]]) -> dict[str, list[_Reply]]:
        """Return the replies that the step owes, by stream: the value that stands, not the one refused."""
        owed: dict[str, list[_Reply]] = {}
        if all(part.results.replies is None for part in step.slices):
            return owed
        for row, (results, index) in enumerate(step.rows()):
            name = results.replies[index] if results.replies is not None else None
            verdict, standing = verdicts.get(row, (Verdict.WRITTEN, b""))
            if not name or verdict is Verdict.OTHER_PAYLOAD:
                continue
            body = standing or mark(results.bodies[index], results.payload_hashes[index])
            status = "error" if is_error(body) else "ok"
            stream = reply_key(self._fleet, name)
            entry = _Reply(stream, (results.ids[index], results.route, status, body), results.ttl_s)
            owed.setdefault(stream, []).append(entry)
        return owed

    def _reply(self, stream: str, replies: list[_Reply]) -> None:
        ttl_ms = max(reply.ttl_s for reply in replies) * 1000
        fields = [value for reply in replies for value in reply.fields]
        self._run(REPLY, [stream], [self._options.reply_max_len, ttl_ms, *fields])

    def _run(self, script: Script, keys: list[str], args: list[Any]) -> Any:
        if self._client is None:
            self._client = self._connect()
        try:
            return self._client.execute_command("EVALSHA", script.sha, len(keys), *keys, *args)
        except NoScriptError:
            self._client.script_load(script.text)
            return self._client.execute_command("EVALSHA", script.sha, len(keys), *keys, *args)

    def _report(self, step: _Step, verdicts: dict[int, tuple[Verdict, bytes]]) -> None:
        first = 0
        for results, receipt, low, high in step.slices:
            refused: list[tuple[int, Refusal]] = []
            stood = 0
            for row in range(first, first + high - low) if verdicts else ():
                verdict = verdicts[row][0] if row in verdicts else Verdict.WRITTEN
                if verdict is Verdict.OTHER_PAYLOAD:
                    index = low + row - first
                    text = duplicate_text(results.ids[index])
                    refused.append((index, Refusal(RefusalKind.DUPLICATE_ID, text)))
                elif verdict is not Verdict.WRITTEN:
                    stood += 1
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
            self._drop()
        options = self._options
        delay_s = min(options.backoff_max_s, options.backoff_first_s * 2.0 ** min(self._tries, 16))
        self._tries += 1
        self._stop.wait(delay_s * self._random.uniform(0.5, 1.0))

    def _went_well(self) -> None:
        if self._away_since is not None:
            log.info("results_back", away_s=round(time.monotonic() - self._away_since, 3), tries=self._tries)
            self._away_since, self._trouble, self._tries = None, None, 0

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        try:
            pool = getattr(client, "connection_pool", None)
            if pool is not None:
                pool.disconnect()
            client.close()
        except Exception as error:
            log.debug("results_drop_failed", error=str(error))
