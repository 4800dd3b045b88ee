"""``inferfleet worker``: the place where a worker's adapters are chosen and joined."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING

import click
import structlog

from inferfleet import __version__
from inferfleet.cli.following import first_routes, open_feed
from inferfleet.cli.frame import Session
from inferfleet.cli.loading import RepositoryModels
from inferfleet.cli.outcomes import open_outcomes
from inferfleet.cli.patience import end_when_told, wait_option
from inferfleet.cli.slot import with_worker_id
from inferfleet.cli.starting import wait_for_all
from inferfleet.cli.tracing import open_traces
from inferfleet.config import Config, check_supported
from inferfleet.control_ports import RouteFeed
from inferfleet.patience import Patience
from inferfleet.routes import Route
from inferfleet.telemetry.logs import configure_process
from inferfleet.telemetry.metrics import PrometheusMetrics
from inferfleet.worker.clock import SystemClock

if TYPE_CHECKING:
    from inferfleet.worker.engine import News
    from inferfleet.worker.lifecycle import Worker

log = structlog.get_logger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""How long a thread may hold the interpreter while another wants it: a device thread that has finished
must not wait the default 5 ms behind the loop."""


@click.command()
@click.option("--until-idle", type=float, metavar="S", help="Exit 0 after S seconds with nothing to do.")
@wait_option
@click.pass_obj
def worker(session: Session, until_idle: float | None, wait_s: float | None) -> None:
    """Run one worker until SIGTERM; it drains and exits 0.

    A second SIGTERM stops at once: what was taken is taken again by another worker.

    \b
    Example:
      inferfleet --config fleet.toml worker
      inferfleet worker --until-idle 10
      inferfleet worker --wait 180
    """
    config = with_worker_id(session.config)
    check_supported(config)
    configure_process(config, "worker", config.worker_id, __version__)
    _limit_threads(config)
    end_when_told()
    news: SimpleQueue[News] = SimpleQueue()
    patience = Patience(wait_s)
    feed = open_feed(config, SystemClock(), lambda: news.put(None), patience.server_s)
    try:
        routes = first_routes(config, feed)
        wait_for_all(config, routes, patience)
        _run(config, feed, routes, news, until_idle)
    finally:
        feed.close()


def _limit_threads(config: Config) -> None:
    """Keep numeric libraries from starting more threads than this worker was granted."""
    if config.worker.threads:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, str(config.worker.threads))


def _run(
    config: Config,
    feed: RouteFeed,
    routes: tuple[Route, ...],
    news: SimpleQueue[News],
    until_idle: float | None,
) -> None:
    from inferfleet.cli.adapters import Joining
    from inferfleet.telemetry.admin import AdminServer
    from inferfleet.worker.lifecycle import Adapters, Worker

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    metrics = PrometheusMetrics(__version__, config.worker_id)
    traces, close_traces = open_traces(config)
    clock = SystemClock()
    models = RepositoryModels(config)
    joining = Joining(config, routes, models, news, metrics, clock)
    joined = joining.join()
    running = Worker(
        config,
        Adapters(
            intake=joined.intake,
            outlet=joined.outlet,
            results=joined.results,
            models=models,
            metrics=metrics,
            clock=clock,
            news=news,
            feed=feed,
            pauses=joined.pauses,
            marks=joined.marks,
            brokers=joined.brokers,
            reporter=joined.reporter,
            follow=joining.follow,
            open=joining.open,
            strict=config.routes.source != "fleet",
            outcomes=partial(open_outcomes, config),
            traces=traces,
            release=__version__,
        ),
    )
    metrics.readiness(lambda: running.health().ready)
    _on_signals(running, config.worker.drain_timeout_s)
    with AdminServer(
        config.worker.admin_address,
        metrics.registry,
        running.health,
        running.status,
        pause=joined.pauses.pause,
        resume=joined.pauses.resume,
        serves=lambda name: any(route.name == name for route in joining.routes),
    ) as admin:
        log.info("worker_started", admin=admin.address)
        try:
            running.run(until_idle)
        finally:
            joined.close()
            close_traces()


def _on_signals(running: Worker, drain_timeout_s: float) -> None:
    """Stop on the first SIGTERM or SIGINT; end the process on a second one, or when the drain takes too long.

    The loop's thread may sit in a call to a broker that does not answer, so signals are heard on a thread of
    their own. Ending without the rest is safe: what has no confirmed outcome is taken again.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _heard)

    def obey(keep: socket.socket = told) -> None:
        del keep
        heard.recv(1)
        running.stop()
        heard.settimeout(drain_timeout_s)
        try:
            (number,) = heard.recv(1)
        except TimeoutError:
            log.warning("drain_cut_short", drain_timeout_s=drain_timeout_s)
            os._exit(0)
        os._exit(128 + number)

    threading.Thread(target=obey, name="signals", daemon=True).start()


def _heard(number: int, frame: FrameType | None) -> None:
    """Take the place of the default action; the wake-up socket has the number already."""
