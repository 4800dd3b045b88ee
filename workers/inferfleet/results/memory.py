"""The result store in this process: the Redis outlet's rules without a server, for simulation and tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from inferfleet.ports import Receipt, Refusal, RefusalKind
from inferfleet.records import Results
from inferfleet.wire.stored import Verdict, duplicate_text, is_error, judge, mark, repeats


class Stored(NamedTuple):
    """One result that stands."""

    body: bytes
    ttl_s: int


class Reply(NamedTuple):
    """One entry of a reply stream."""

    id: str
    route: str
    status: str
    body: bytes


class MemoryResults:
    """A :class:`~inferfleet.ports.ResultOutlet` whose store is a dictionary; results never expire.

    ``now`` is the clock of ``away_since``. Writes happen in ``publish`` while the store is there, and in
    ``come_back`` for what was held; receipts hear of them in ``poll`` only, as from any outlet.
    """

    def __init__(
        self,
        *,
        wake: Callable[[], None] = lambda: None,
        now: Callable[[], float] = lambda: 0.0,
        stood: Callable[[str, int], None] | None = None,
        reply_max_len: int = 10_000,
    ) -> None:
        self.results: dict[tuple[str, str], Stored] = {}
        """What stands, by route and id."""
        self.replies: dict[str, list[Reply]] = {}
        """The reply streams, by name."""
        self.again: dict[tuple[str, str], Counter[str]] = {}
        """What came again under a route and id and was not written: how often the same, how often another."""
        self._wake = wake
        self._now = now
        self._tell_stood = stood
        self._reply_max_len = reply_max_len
        self._held: list[tuple[Results, Receipt]] = []
        self._news: list[tuple[Results, Receipt, list[Verdict]]] = []
        self._away_since: float | None = None

    @property
    def away_since(self) -> float | None:
        """Time since when the store is away; ``None`` while it is there."""
        return self._away_since

    def go_away(self) -> None:
        """Keep what is published from now on, unwritten."""
        if self._away_since is None:
            self._away_since = self._now()

    def come_back(self) -> None:
        """Write what was held, in the order it was published."""
        self._away_since = None
        held, self._held = self._held, []
        for results, receipt in held:
            self._write(results, receipt)

    def publish(self, results: Results, receipt: Receipt) -> None:
        """Hand over without waiting."""
        if self._away_since is None:
            self._write(results, receipt)
        else:
            self._held.append((results, receipt))

    def poll(self) -> None:
        """Deliver confirmations and refusals that have arrived."""
        news, self._news = self._news, []
        for results, receipt, verdicts in news:
            refused = [i for i, verdict in enumerate(verdicts) if verdict is Verdict.OTHER_PAYLOAD]
            stood = len(verdicts) - verdicts.count(Verdict.WRITTEN) - len(refused)
            if stood and self._tell_stood is not None:
                self._tell_stood(results.route, stood)
            for index in refused:
                text = duplicate_text(results.ids[index])
                receipt.refused(index, Refusal(RefusalKind.DUPLICATE_ID, text))
            if len(verdicts) > len(refused):
                receipt.confirmed(len(verdicts) - len(refused))

    def pending(self) -> int:
        """Results handed over and not yet confirmed or refused."""
        return sum(len(results) for results, _ in self._held) + sum(len(news[0]) for news in self._news)

    def close(self, timeout_s: float) -> int:  # noqa: ARG002 - nothing here can take time
        """Deliver what is written; return how many stay unconfirmed."""
        self.poll()
        return self.pending()

    def _write(self, results: Results, receipt: Receipt) -> None:
        verdicts = [self._write_row(results, index) for index in range(len(results))]
        self._news.append((results, receipt, verdicts))
        self._wake()

    def _write_row(self, results: Results, index: int) -> Verdict:
        body = mark(results.bodies[index], results.payload_hashes[index])
        key = (results.route, results.ids[index])
        standing = self.results.get(key)
        verdict = Verdict.WRITTEN
        if not results.reply_only:
            if standing is not None:
                verdict = judge(standing.body, body)
            if verdict is Verdict.WRITTEN:
                self.results[key] = Stored(body, results.ttl_s)
            elif standing is not None:
                self.again.setdefault(key, Counter())[repeats(standing.body, body)] += 1
        name = results.replies[index] if results.replies is not None else None
        if name and verdict is not Verdict.OTHER_PAYLOAD:
            answer = standing.body if standing is not None and verdict is Verdict.STOOD else body
            stream = self.replies.setdefault(name, [])
            status = "error" if is_error(answer) else "ok"
            stream.append(Reply(results.ids[index], results.route, status, answer))
            del stream[: -self._reply_max_len]
        return verdict
