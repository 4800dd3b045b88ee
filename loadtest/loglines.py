"""What a log line costs: ``python -m loadtest.loglines`` prints microseconds of processor time, best of many.

Three kinds in each format: an event of ordinary life, a warning that is told, a warning that is held back as
a repeat; and one below the level. Writing itself is left out: the lines go nowhere.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable

import structlog

from inferfleet.telemetry.logs import configure

ROUNDS, CALLS = 40, 500
CONTEXT = {"fleet": "shop", "service": "inferfleet-worker", "node": "w-1", "release": "0.1.0", "pid": 7}
SECRETS = ("a-password-of-the-broker", "a-password-of-the-store")


class Nowhere(io.StringIO):
    """A stream that keeps nothing."""

    def write(self, text: str) -> int:
        """Count what was written."""
        return len(text)


def microseconds(call: Callable[[], object]) -> float:
    """Return what one call costs in the quietest round."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, time.thread_time() - began)
    return round(best / CALLS * 1e6, 1)


def measure(form: str) -> dict[str, float]:
    """Return the costs in one format."""
    log = structlog.get_logger()

    def info() -> None:
        log.info("model_ready", model="digits", version="3")

    def warning() -> None:
        log.warning("results_away", reason="full", error="OOM command not allowed", kind="ResponseError")

    def debug() -> None:
        log.debug("results_drop_failed", error="closed")

    configure(form, "info", Nowhere(), SECRETS, context=CONTEXT, repeat_window_s=0)
    found = {"info": microseconds(info), "warning": microseconds(warning), "below": microseconds(debug)}
    configure(form, "info", Nowhere(), SECRETS, context=CONTEXT, repeat_window_s=3600)
    log = structlog.get_logger()
    return {**found, "held_back": microseconds(warning)}


if __name__ == "__main__":
    print(json.dumps({form: measure(form) for form in ("json", "ecs", "console")}, indent=2))
