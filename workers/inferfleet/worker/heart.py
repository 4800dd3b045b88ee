"""What a worker says of itself: every few seconds to the control plane, and to whoever asks its address."""

from __future__ import annotations

from collections import Counter

from inferfleet.config import Config
from inferfleet.control_ports import Reporter, RouteFeed
from inferfleet.plane import WorkerReport, version_name
from inferfleet.ports import Clock
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.worker.adopting import Adopting
from inferfleet.worker.loop import WorkerLoop
from inferfleet.worker.versions import Versions


class Heart:
    """Builds the reports of one worker; owned by the worker loop's thread."""

    def __init__(
        self,
        config: Config,
        feed: RouteFeed,
        reporter: Reporter | None,
        loop: WorkerLoop,
        versions: Versions,
        adopting: Adopting,
        metrics: PrometheusMetrics,
        clock: Clock,
        release: str,
    ) -> None:
        self._config = config
        self._feed = feed
        self._reporter = reporter
        self._loop = loop
        self._versions = versions
        self._adopting = adopting
        self._metrics = metrics
        self._clock = clock
        self._release = release
        self._started_ms = clock.utc_ms()
        self._beat_at = self._counted_at = float("-inf")
        self._said: dict[str, int] = {}
        self._ended: Counter[str] = Counter()
        self._stale_since: float | None = None
        self._rates: dict[str, float] = {}
        self.stale = ""

    def beat(self, *, draining: bool) -> None:
        """Report, if it is time; what was taken over since, and the drain, are reported at once."""
        now = self._clock.monotonic()
        adopted = self._adopting.adopted
        due = now - self._beat_at >= self._config.reports.heartbeat_s
        if not due and not draining and adopted == self._said:
            return
        self._said = adopted
        self._look_at_feed(now)
        if self._reporter is not None:
            self._count(now - self._counted_at)
            self._reporter.heartbeat(self._report(draining))
        self._beat_at = now

    def _look_at_feed(self, now: float) -> None:
        self.stale = self._feed.stale
        if not self.stale:
            self._stale_since = None
        elif self._stale_since is None:
            self._stale_since = now
        since = self._stale_since
        self._metrics.route_revision_age(0.0 if since is None else now - since)

    def _count(self, seconds: float) -> None:
        ended = Counter(self._loop.ended)
        if seconds < 1:  # too short for a rate
            return
        names = ended.keys() | self._rates.keys()
        self._rates = {name: (ended[name] - self._ended[name]) / seconds for name in names}
        self._ended, self._counted_at = ended, self._clock.monotonic()

    def _report(self, draining: bool) -> WorkerReport:
        config, versions = self._config, self._versions
        return WorkerReport(
            worker=config.worker_id,
            pool=config.worker.pool,
            group=config.group,
            release=self._release,
            device=config.worker.device,
            started_ms=self._started_ms,
            at_ms=self._clock.utc_ms(),
            head=self._adopting.log.head,
            adopted=self._adopting.adopted,
            ready=sorted(version_name(*key) for key in versions.loaded),
            loading=sorted(version_name(*key) for key in versions.loading),
            refused=self._adopting.refusals(versions.refused),
            digests=versions.digests(),
            lag=self._loop.lag(),
            rows_per_s={name: round(rate, 3) for name, rate in self._rates.items()},
            paused=dict(self._loop.held),
            memory_bytes=versions.held_bytes,
            stale=self.stale,
            draining=draining,
        )
