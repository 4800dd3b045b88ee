"""Recorded windows as the traffic of simulated rollouts: real volumes, batches, spans and failures. Pure.

In each look the next recorded minute is played, over and over; each of its windows goes to an arm by chance,
with the arm's share. So both arms are the same version in truth, and what a policy ends is ended wrongly,
unless failures are added to the new version's arm. Whole windows change arms, so the sample-ratio check is
left out, and the recording should have many windows a minute: with few, a small step sees little.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inferfleet.core.simulation import Outcome, Scenario, World
from inferfleet.evidence import MINUTE_MS
from inferfleet.policies import Policy
from inferfleet.rollouts import replace
from inferfleet.routes import Route
from inferfleet.summaries import Clustered, Comparison, Window
from inferfleet.variants import BUCKETS


class Recording:
    """Windows of answering versions, by the minute in which they ended; empty ones are left out."""

    def __init__(self, windows: Sequence[Window]) -> None:
        by_minute: dict[int, list[Window]] = {}
        for window in windows:
            if window.role == "primary" and window.requests:
                by_minute.setdefault(window.end_ms // MINUTE_MS, []).append(window)
        self.minutes = [by_minute[minute] for minute in sorted(by_minute)]

    @property
    def error_rate(self) -> float:
        """The share of recorded requests that failed."""
        windows = [window for minute in self.minutes for window in minute]
        trials = sum(window.failures.trials for window in windows)
        return sum(window.failures.events for window in windows) / trials if trials else 0.0


class RecordedWorld(World):
    """One rollout on recorded traffic."""

    def __init__(
        self,
        policy: Policy,
        scenario: Scenario,
        route: Route,
        rng: np.random.Generator,
        recording: Recording,
    ) -> None:
        self.recording = recording
        self.at = int(rng.integers(len(recording.minutes)))
        super().__init__(policy, scenario, route, rng)

    def bring(self, look_s: float) -> None:
        """Play as many recorded minutes as the look lasts."""
        for _ in range(max(1, round(look_s / 60))):
            self._play(self.recording.minutes[self.at])
            self.at = (self.at + 1) % len(self.recording.minutes)

    def _play(self, windows: Sequence[Window]) -> None:
        if self.rollout.phase == "shadow":
            known = self.evidence.comparison or Comparison(kind="labels")
            pairs = sum(window.requests for window in windows)
            known.pairs += pairs
            known.identical += pairs
            self.evidence.comparison = known
            return
        shares = [(each.name, each.version, each.buckets / BUCKETS) for each in self.rollout.current.variants]
        draws = self.rng.random(len(windows)).tolist()
        for window, draw in zip(windows, draws, strict=True):
            for name, version, share in shares:
                if draw < share:
                    self.evidence.add(self._as(window, name, version), self.rollout)
                    break
                draw -= share

    def _as(self, window: Window, name: str, version: str) -> Window:
        failures = window.failures
        if version == self.rollout.to_version and self.scenario.regression is not None:
            before = self.recording.error_rate
            extra = max(0.0, (self.scenario.regression - before) / max(1e-9, 1 - before))
            failures = added(failures, int(self.rng.binomial(int(failures.trials - failures.events), extra)))
        return replace(
            window,
            route=self.rollout.route,
            model=self.rollout.model,
            variant=name,
            version=version,
            revision=self.revisions,
            end_ms=self.now_ms,
            failures=failures,
            first_seen=0,
            crash=False,
        )


def added(failures: Clustered, extra: int) -> Clustered:
    """Return failures with ``extra`` more, each in a batch that is like the mean of all."""
    clusters = max(1, failures.clusters)
    return Clustered(
        failures.clusters,
        failures.trials,
        failures.events + extra,
        failures.trials_2,
        failures.events_2 + extra * (1 + 2 * failures.events / clusters),
        failures.product + extra * failures.trials / clusters,
    )


def replay(
    policy: Policy, scenario: Scenario, route: Route, recording: Recording, rollouts: int, seed: int
) -> list[Outcome]:
    """Return how each of ``rollouts`` on the recording ended; the same seed gives the same."""
    return [
        RecordedWorld(policy, scenario, route, np.random.default_rng([seed, number]), recording).run()
        for number in range(rollouts)
    ]
