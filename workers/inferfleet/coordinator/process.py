"""One coordinator replica: the API, the leader loop and the probes, from start to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import NamedTuple

import structlog
import uvicorn

from inferfleet.coordinator.app import Application
from inferfleet.coordinator.connections import ImpatientProtocol
from inferfleet.coordinator.exposure import Exposure
from inferfleet.coordinator.leader import Leadership
from inferfleet.telemetry.admin import AdminServer, Health

log = structlog.get_logger(__name__)

GRACE_S = 3
"""How long requests that are being answered may take after SIGTERM."""
STOP_S = 10.0
"""From SIGTERM to the end of the process, at most."""
CONNECTIONS = 256
HEADER_BYTES = 32_768


class Replica(NamedTuple):
    """The parts of one replica; ``admin`` is bound and not started."""

    application: Application
    leadership: Leadership
    exposure: Exposure
    admin: AdminServer


class _Server(uvicorn.Server):
    """A server that leaves signals to whoever runs it: a stop that was asked for is no failure."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def health_of(leadership: Leadership) -> Health:
    """Return how a replica is: alive while this can be asked, ready while its store answers."""
    reasons = [leadership.standing.trouble] if leadership.standing.trouble else []
    if leadership.stopping:
        reasons.append("this replica stops")
    return Health(live=True, ready=not reasons, reasons=tuple(reasons))


def run(replica: Replica) -> None:
    """Serve until SIGTERM or SIGINT; a second one, or a stop that takes too long, ends the process at once.

    Ending at once is safe: a change is either committed as a whole or not at all, and the lease runs out.
    """
    exposure = replica.exposure
    server = _Server(
        uvicorn.Config(
            replica.application,
            http=ImpatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=CONNECTIONS,
            limit_concurrency=CONNECTIONS,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=GRACE_S,
            ssl_certfile=exposure.certificate or None,
            ssl_keyfile=exposure.key or None,
        )
    )
    leading = threading.Thread(target=replica.leadership.run, name="leader", daemon=True)
    with replica.admin:
        leading.start()
        tokens = "everybody is local and may do everything" if exposure.tokens is None else "token_file"
        log.info("coordinator_started", address=exposure.url, admin=replica.admin.address, access=tokens)
        asyncio.run(_serve(server, replica))
        leading.join(STOP_S)
    log.info("coordinator_stopped")


async def _serve(server: _Server, replica: Replica) -> None:
    """Serve; signals are heard by the loop, which never waits for anything."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        if server.should_exit:
            os._exit(128 + number)
        log.info("coordinator_stops", signal=signal.Signals(number).name)
        server.should_exit = True
        replica.leadership.stop()
        threading.Thread(target=_cut_short, name="stop", daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    await server.serve(sockets=[replica.exposure.listener])


def _cut_short() -> None:
    threading.Event().wait(STOP_S)
    log.warning("stop_cut_short", after_s=STOP_S)
    os._exit(0)
