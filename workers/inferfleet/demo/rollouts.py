"""The second act: a better version is promoted and a broken one is found out, on live traffic with labels.

Everything is asked of ``inferfleet`` itself, as a person would: ``rollout start`` on the command line, and
the coordinator's API for how it stands. Policies are the usual ones with spans of seconds.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from inferfleet.demo import live
from inferfleet.demo.command import command, environment, said_by
from inferfleet.demo.digits import BROKEN
from inferfleet.demo.live import LiveTraffic
from inferfleet.demo.processes import DemoError, Processes, Started
from inferfleet.demo.screen import LiveTable, Screen
from inferfleet.demo.stage import Stage

_READY_TIMEOUT_S = 60.0
_ROLLOUT_TIMEOUT_S = 90.0
_SETTLE_TIMEOUT_S = 20.0
_LOOK_S = 0.2

_METRIC = """
[[metric]]
name = "correct"
margin = 0.1
"""
CANARY = (
    """\
kind = "canary"
bake_s = 2
feedback = "kafka:{feedback}"

[shadow]
enabled = false

[[step]]
percent = 10
dwell_s = 2
minimum = 60

[[step]]
percent = 50
dwell_s = 2
minimum = 200

[guardrails]
tuning_messages = 200   # labels of a few seconds are enough for what is plainly wrong
p95_compute_ratio = 5   # what runs on a busy laptop says little about speed
p95_latency_ratio = 5
p99_latency_ratio = 5
cost_ratio = 5
"""
    + _METRIC
)
SHADOW = """\
kind = "shadow"

[shadow]
duration_s = 2
minimum_pairs = 300
secondary = 0.1
"""
POLICIES = {"canary": CANARY, "shadow": SHADOW}


@dataclass(frozen=True, slots=True)
class Ending:
    """How one rollout ended: ``outcome`` is the coordinator's own words, ``seconds`` from start to end."""

    title: str
    phase: str
    outcome: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What the second act found; ``bad_s`` is from the first to the last answer of the broken version."""

    endings: list[Ending]
    count: live.Count
    bad_s: float
    wanted: dict[str, str] = field(
        default_factory=lambda: {"2": "done", f"{BROKEN} shadow": "aborted", f"{BROKEN} canary": "aborted"}
    )

    @property
    def unanswered(self) -> int:
        """Live requests without an outcome."""
        return self.count.sent - len(self.count.answered)

    @property
    def passed(self) -> bool:
        """Whether the better version answers, the broken one does not, and nothing was lost."""
        found = {each.title: each.phase for each in self.endings}
        return found == self.wanted and not self.unanswered and not self.count.errors


def start_coordinator(processes: Processes, stage: Stage, api: str) -> Started:
    """Start ``inferfleet coordinator`` and return when its API answers."""
    words = command("coordinator", "--config", str(stage.fleet_toml))
    started = processes.start("coordinator", words, stage.logs / "coordinator.log", rank=1, env=environment())
    give_up_at = time.monotonic() + _READY_TIMEOUT_S
    while _asked(api, "/v1/routes") is None:
        ended = started.ended()
        if ended is not None or time.monotonic() > give_up_at:
            raise DemoError(ended or f"the coordinator did not answer; see {started.log}")
        time.sleep(_LOOK_S)
    return started


class SecondAct:
    """Three rollouts on the live route, one after the other."""

    def __init__(self, stage: Stage, traffic: LiveTraffic, screen: Screen, api: str) -> None:
        self._stage = stage
        self._traffic = traffic
        self._screen = screen
        self._api = api

    def perform(self) -> Rollouts:
        """Send live requests, roll out, and wait for the last answer."""
        self._traffic.start()
        endings = [
            self._roll("2", "canary", "2", "version 2 learned from more images"),
            self._roll(BROKEN, "shadow", f"{BROKEN} shadow", "a first look at version 3"),
            self._roll(BROKEN, "canary", f"{BROKEN} canary", "what if nobody had looked"),
        ]
        self._traffic.stop_sending()
        self._settle()
        count = self._traffic.count
        served = count.versions.get(BROKEN)
        bad_s = served.last_at - served.first_at if served else 0.0
        return Rollouts(endings, count, bad_s)

    def _roll(self, version: str, kind: str, title: str, reason: str) -> Ending:
        policy = self._stage.folder / f"{kind}.toml"
        policy.write_text(POLICIES[kind].format(feedback=live.FEEDBACK), encoding="utf-8")
        words = ["rollout", "start", live.ROUTE, "--to", version, "--policy", str(policy)]
        shown = " ".join(words)
        began_at = time.monotonic()
        started = json.loads(
            said_by(*words, "--reason", reason, "--json", "--config", str(self._stage.fleet_toml))
        )
        self._screen.say(f"[bold]inferfleet {shown}[/bold]")
        view = self._follow(started["id"])
        seconds = time.monotonic() - began_at
        self._screen.say(
            f"version {version} ({kind}): {view['phase']} after {seconds:.1f} s: {view['outcome']}"
        )
        if view["phase"] == "done" and kind != "shadow":
            self._stage.promoted(version)
        return Ending(title, view["phase"], view["outcome"], seconds)

    def _follow(self, rollout: str) -> Any:
        give_up_at = time.monotonic() + _ROLLOUT_TIMEOUT_S
        with self._screen.live_table() as table:
            while True:
                self._traffic.check()
                view = _asked(self._api, f"/v1/rollouts/{rollout}")
                if view is not None:
                    self._draw(table, view)
                    if view["ended"]:
                        return view
                if time.monotonic() > give_up_at:
                    waits = "; ".join(view["waits_for"]) if view else "the coordinator does not answer"
                    raise DemoError(
                        f"rollout {rollout} did not end: {waits or 'nothing is said to be missing'}"
                    )
                time.sleep(_LOOK_S)

    def _draw(self, table: LiveTable, view: Any) -> None:
        count = self._traffic.count
        share = f"{view['percent']:g} %"
        waits = "; ".join(view["waits_for"]) or (view["history"][-1]["reason"] if view["history"] else "")
        lines = [
            (version, str(served.answered), f"{served.accuracy:.1%}")
            for version, served in sorted(count.versions.items())
        ]
        table.show(f"version {view['to_version']}: {view['phase']}, {share} of the keys", waits, lines)

    def _settle(self) -> None:
        """Return when every live request has its outcome, or when nothing moves any more."""
        give_up_at = time.monotonic() + _SETTLE_TIMEOUT_S
        count = self._traffic.count
        while len(count.answered) < count.sent and time.monotonic() < give_up_at:
            self._traffic.check()
            time.sleep(_LOOK_S)


def _asked(api: str, path: str) -> Any:
    """Return what the coordinator says, ``None`` where it does not answer with 200."""
    try:
        with urllib.request.urlopen(f"http://{api}{path}", timeout=5.0) as answer:
            return json.loads(answer.read())
    except (urllib.error.URLError, OSError, ValueError):
        return None
