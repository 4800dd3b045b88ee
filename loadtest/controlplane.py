"""The control plane at size: a real Redis, a real coordinator with rollouts, and a crowd of workers.

What is timed is a change of one route: announced, ready at every worker of its pool, given its time by the
leading coordinator, in force, and known to every worker of the fleet.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

from inferfleet.catalogue import VersionFacts
from inferfleet.control.store import RedisControlStore
from inferfleet.coordinator.messages import RolloutRequest
from inferfleet.coordinator.rollouts import RolloutControl
from inferfleet.plane import AuditEntry, Change, Draft
from inferfleet.redis_access import Place, open_redis
from inferfleet.revisions import Revision
from inferfleet.routes import Route, route_of
from inferfleet.worker.clock import SystemClock
from loadtest import crowd
from loadtest.subjects import REPOSITORY_ROOT, Subject
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

FLEET = "crowd"
JOINED_S = 180.0
CHANGED_S = 60.0
SETTLE_S = 15.0


@dataclass(frozen=True)
class Plan:
    """How many of what, and for how long: each change of a route waits for the one before."""

    workers: int = 500
    routes: int = 200
    pools: int = 10
    rollouts: int = 10
    changes: int = 8


class Instants(NamedTuple):
    """The instants of one change, in epoch seconds."""

    announced: float
    timed: float
    """When the coordinator gave it its time: the barrier was passed."""
    in_force: float
    seen: float
    """When the last worker of the whole fleet had the revision with the time."""

    @property
    def effective_s(self) -> float:
        """Seconds from the announcement until it is in force and everybody knows."""
        return max(self.in_force, self.seen) - self.announced


def figures(changes: Sequence[Instants]) -> dict[str, float]:
    """Return medians and the largest, in seconds."""
    whole = [each.effective_s for each in changes]
    spread = [each.seen - each.timed for each in changes]
    found = {
        "effective_everywhere_s": statistics.median(whole),
        "effective_everywhere_most_s": max(whole),
        "barrier_s": statistics.median(each.timed - each.announced for each in changes),
        "known_to_all_after_s": statistics.median(spread),
        "known_to_all_after_most_s": max(spread),
    }
    return {name: round(value, 3) for name, value in found.items()}


def rates(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], seconds: float
) -> dict[str, float]:
    """Return calls a second of each command between two looks at ``INFO commandstats``, busiest first."""
    found = {
        name.removeprefix("cmdstat_"): (stats["calls"] - before.get(name, {}).get("calls", 0)) / seconds
        for name, stats in after.items()
    }
    return {
        name: round(rate, 1) for name, rate in sorted(found.items(), key=lambda each: -each[1]) if rate >= 0.1
    }


INSIDE = frozenset(("set", "zadd", "time", "zremrangebyscore", "xadd", "pexpire"))
"""Commands that come from scripts alone, as far as this load goes: the server runs them without a client."""


def from_clients(found: Mapping[str, float]) -> float:
    """Return how many calls a second clients made themselves."""
    return round(sum(rate for name, rate in found.items() if name not in INSIDE), 1)


class Catalogue:
    """Any version of any model."""

    def latest(self, model: str) -> str:
        """Return a version."""
        return self.version(model, "1").version

    def version(self, model: str, version: str) -> VersionFacts:
        """Return what it would be."""
        return VersionFacts(model, version, "d" * 64, None)


def route(number: int, pools: int, version: str = "1") -> Route:
    """Return one of the fleet's routes; its pool is one of ``pools``."""
    name = f"r-{number:03d}"
    plain = {"name": name, "source": f"kafka:{name}.requests", "results": [f"kafka:{name}.results"]}
    plain |= {"model": f"m-{number:03d}", "version": version, "pool": f"p-{number % pools}"}
    return route_of(plain, FLEET, "loadtest")


def run(plan: Plan, folder: Path | None = None, *, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run it and return the figures; a few minutes at most."""
    with contextlib.ExitStack() as leaving:
        if folder is None:
            folder = Path(leaving.enter_context(tempfile.TemporaryDirectory(prefix="inferfleet-loadtest-")))
        # As it is run in production: what is lost with a machine is a second at most.
        server = leaving.enter_context(RedisServer(folder / "redis", config=["--appendfsync", "everysec"]))
        stage = _Stage(plan, server, folder)
        leaving.callback(stage.close)
        return stage.measure(tell)


class _Stage:
    """The processes, and the hand that changes routes."""

    def __init__(self, plan: Plan, server: RedisServer, folder: Path) -> None:
        self._plan = plan
        self._server = server
        self._folder = folder
        where = Place(server.url)
        self._store = RedisControlStore(
            lambda: open_redis(where), FLEET, address=where.shown, utc_ms=SystemClock().utc_ms
        )
        self._crowd = Subject("crowd", folder / "crowd.log")
        self._coordinator = Subject("coordinator", folder / "coordinator.log")

    def close(self) -> None:
        self._coordinator.kill()
        self._crowd.kill()
        self._store.close()

    def measure(self, tell: Callable[[str], None]) -> dict[str, Any]:
        plan, store = self._plan, self._store
        drafts = tuple(Draft(f"r-{n:03d}", route(n, plan.pools), 0, "apply") for n in range(plan.routes))
        known = store.commit(Change(actor="loadtest", audit=(_entry("all"),), drafts=drafts))[-1].number
        began = time.monotonic()
        self._join(known)
        tell(f"{plan.workers} workers have joined in {time.monotonic() - began:.0f} s")
        self._lead()
        control = RolloutControl(store, Catalogue(), SystemClock())
        for number in range(plan.rollouts):
            control.start(RolloutRequest(route=f"r-{number:03d}", version="2"), author="loadtest")
        time.sleep(SETTLE_S)
        tell(f"a coordinator leads, {plan.rollouts} rollouts have begun")
        before, at = self._look(), time.monotonic()
        made = [self._change(plan.rollouts + number, tell) for number in range(plan.changes)]
        after, seconds = self._look(), time.monotonic() - at
        self._crowd.terminate()
        seen = json.loads((self._folder / "seen.json").read_text())
        changes = [_instants(announced, timed, seen["seen"], plan.workers) for announced, timed in made]
        commands = rates(before.commands, after.commands, seconds)
        return {
            "plan": asdict(plan),
            "seconds": round(seconds, 1),
            **figures(changes),
            "redis_commands_per_s": round(sum(commands.values()), 1),
            "redis_calls_by_clients_per_s": from_clients(commands),
            "redis_cpu": round((after.redis_s - before.redis_s) / seconds, 3),
            "coordinator_cpu": round((after.coordinator_s - before.coordinator_s) / seconds, 3),
            "crowd_cpu": round((after.crowd_s - before.crowd_s) / seconds, 3),
            "redis_memory_mb": round(after.memory_bytes / 2**20, 1),
            "windows_dropped": seen["dropped"],
            "by_command": commands,
        }

    def _join(self, known: int) -> None:
        plan, path = self._plan, self._folder / "crowd.json"
        told = crowd.Plan(
            url=self._server.url,
            fleet=FLEET,
            workers=plan.workers,
            pools=plan.pools,
            known=known,
            output=str(self._folder / "seen.json"),
        )
        path.write_bytes(msgspec.json.encode(told))
        self._crowd.start([sys.executable, "-m", "loadtest.crowd", str(path)], cwd=REPOSITORY_ROOT)

        def joined() -> bool:
            self._crowd.check()
            found = self._store.workers()
            return len(found) == plan.workers and all(each.head.number == known for each in found)

        wait_until(joined, JOINED_S, f"{plan.workers} workers have the routes", every_s=1.0)

    def _lead(self) -> None:
        config = self._folder / "fleet.toml"
        (self._folder / "models").mkdir(exist_ok=True)
        config.write_text(
            f'[fleet]\nname = "{FLEET}"\n[redis]\nurl = "{self._server.url}"\n[routes]\nsource = "fleet"\n'
            '[coordinator]\naddress = "127.0.0.1:0"\nadmin_address = "127.0.0.1:0"\n[log]\nformat = "json"\n'
        )
        words = [sys.executable, "-m", "inferfleet.cli", "--config", str(config), "coordinator"]
        self._coordinator.start(words, cwd=self._folder)
        with self._server.client() as client:

            def leads() -> bool:
                self._coordinator.check()
                return bool(client.exists(f"{{{FLEET}}}:lease"))

            wait_until(leads, 30, "the coordinator leads")

    def _change(self, number: int, tell: Callable[[str], None]) -> tuple[Revision, Revision]:
        """Give a route another version; return its announcement, and the revision that has a time."""
        name, store = f"r-{number:03d}", self._store
        draft = Draft(name, route(number, self._plan.pools, "2"), None, "apply")
        expected = {name: store.load().latest(name)}
        change = Change(actor="loadtest", audit=(_entry(name),), drafts=(draft,), expected=expected)
        (announced,) = store.commit(change)

        def timed() -> Revision | None:
            self._crowd.check()
            self._coordinator.check()
            found = store.load().newest(name)
            return found if found is not None and found.number > announced.number else None

        found = wait_until(timed, CHANGED_S, f"the change of {name} has its time", every_s=0.1)
        time.sleep(max(0.0, (found.effective_from_ms or 0) / 1000 - time.time()) + 0.5)
        tell(f"{name}: {(found.at_ms - announced.at_ms) / 1000:.2f} s until every worker was ready")
        return announced, found

    def _look(self) -> _Spent:
        with self._server.client() as client:
            commands: Any = client.info("commandstats")
            memory: Any = client.info("memory")
        pids = (self._server.pid, self._coordinator.pid, self._crowd.pid)
        return _Spent(commands, *map(_cpu_s, pids), memory["used_memory"])


class _Spent(NamedTuple):
    commands: Mapping[str, Mapping[str, float]]
    redis_s: float
    coordinator_s: float
    crowd_s: float
    memory_bytes: int


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _entry(name: str) -> AuditEntry:
    return AuditEntry(actor="loadtest", action="apply", subject=f"route {name}")


def _instants(
    announced: Revision, timed: Revision, seen: Mapping[str, Sequence[float]], workers: int
) -> Instants:
    count, _, last = seen[str(timed.number)]
    if count != workers:
        raise RuntimeError(f"revision {timed.number} was seen by {count} of {workers} workers")
    in_force = (timed.effective_from_ms or 0) / 1000
    return Instants(announced.at_ms / 1000, timed.at_ms / 1000, in_force, last)


def table(result: Mapping[str, Any]) -> str:
    """Return the figures for people."""
    plan = result["plan"]
    lines = [
        f"{plan['workers']} workers in {plan['pools']} pools, {plan['routes']} routes, "
        f"{plan['rollouts']} rollouts, {plan['changes']} changes in {result['seconds']} s",
        f"announced -> in force and known to all   median {result['effective_everywhere_s']:.2f} s, "
        f"most {result['effective_everywhere_most_s']:.2f} s",
        f"  of that until every worker was ready   median {result['barrier_s']:.2f} s",
        f"  a revision known to all after          median {result['known_to_all_after_s']:.2f} s, "
        f"most {result['known_to_all_after_most_s']:.2f} s",
        f"Redis   {result['redis_calls_by_clients_per_s']:.0f} calls/s by clients, "
        f"{result['redis_commands_per_s']:.0f} commands/s with those inside scripts, "
        f"{100 * result['redis_cpu']:.0f} % of a core, {result['redis_memory_mb']:.0f} MiB",
        f"coordinator   {100 * result['coordinator_cpu']:.0f} % of a core   "
        f"(the simulated workers: {100 * result['crowd_cpu']:.0f} %)",
    ]
    return "\n".join(lines)
