"""A coordinator for tests of rollouts: it makes windows, looks, and gives routes their time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from inferfleet.core.rollout import Start, Step, advance, begin, took_effect
from inferfleet.evidence import Evidence
from inferfleet.policies import Policy, default_policy
from inferfleet.rollouts import Rollout, decode_rollout, encode_rollout
from inferfleet.routes import Route, parse_routes
from inferfleet.summaries import Comparison, Window

ROUTE = parse_routes(
    '[[route]]\nname = "digits"\nsource = "kafka:in"\nresults = ["redis"]\nmodel = "digits"\nversion = "1"',
    "fleet",
    "routes.toml",
).routes[0]
START = Start("digits-1", "2", "sha256:2", "ada", "better digits")
T0 = 1_800_000_000_000
COMPUTE_S = np.array([0.01, 0.011, 0.012])


def window(
    variant: str,
    version: str,
    *,
    requests: int,
    failed: int = 0,
    revision: int = 1,
    at_ms: int = T0,
    worker: str = "w-1",
    batch: int = 4,
    invalid: int = 0,
    slow: float = 1.0,
) -> Window:
    """Return a window of ``requests`` in batches, among which the ``failed`` ones are spread out."""
    made = Window(
        worker=worker,
        route="digits",
        model="digits",
        version=version,
        variant=variant,
        revision=revision,
        start_ms=at_ms - 60_000,
        end_ms=at_ms,
        requests=requests,
        rows=requests,
        invalid=invalid,
        first_seen=requests,
    )
    batches = max(1, requests // batch)
    for index in range(batches):
        size = requests // batches + (index < requests % batches)
        bad = failed // batches + (index < failed % batches)
        if size:
            made.failures.add(size, min(size, bad))
    spans = np.resize(COMPUTE_S, requests) * slow
    made.compute.add(spans)
    made.latency.add(spans * 3)
    made.compute_s = float(spans.sum())
    made.batches = batches
    return made


def compared(pairs: int, different: int = 0) -> Comparison:
    """Return pairs of labels, of which some differ."""
    same = pairs - different
    return Comparison(
        kind="labels",
        pairs=pairs,
        identical=same,
        different=different,
        label_changes=different,
        agreed={"a": same},
        flips={"a>b": different} if different else {},
    )


class Desk:
    """One rollout with its evidence and its own clock; every minute the arms answer and the machine looks."""

    def __init__(self, policy: Policy | None = None, route: Route = ROUTE, now_ms: int = T0) -> None:
        self.now_ms = now_ms
        self.evidence = Evidence()
        self.revisions = 0
        self.steps: list[Step] = []
        self.rollout: Rollout
        self.take(begin(START, route, policy or default_policy(), now_ms))

    def take(self, step: Step) -> Step:
        """Commit a step as a coordinator would: routes with a barrier get their time at once."""
        self.rollout = decode_rollout(encode_rollout(step.rollout))
        if step.changed or step.route is not None:
            self.steps.append(step)
        if step.route is not None:
            self.revisions += 1
            at_ms = self.now_ms if step.effective_from_ms is None else step.effective_from_ms
            self.rollout = took_effect(self.rollout, self.revisions, at_ms, self.now_ms)
        return step

    def answer(self, requests: Mapping[str, int], failed: Mapping[str, int] | None = None) -> None:
        """Let arms answer so many messages, in the revision in force."""
        failed = failed or {}
        versions = {each.name: each.version for each in self.rollout.current.variants}
        for variant, count in requests.items():
            if variant in versions:
                made = window(
                    variant,
                    versions[variant],
                    requests=count,
                    failed=failed.get(variant, 0),
                    revision=self.revisions,
                    at_ms=self.now_ms,
                )
                self.evidence.add(made, self.rollout)

    def compare(self, pairs: int, different: int = 0) -> None:
        """Let the shadow answer."""
        made = window("candidate", "2", requests=pairs, revision=self.revisions, at_ms=self.now_ms)
        made.role = "shadow"
        made.comparison = compared(pairs, different)
        self.evidence.add(made, self.rollout)

    def minute(self, rate: int = 6_000, failed: Callable[[str, int], int] | None = None) -> Step:
        """Let a minute pass in which ``rate`` messages come, and look."""
        self.now_ms += 60_000
        if self.rollout.phase == "shadow":
            self.compare(rate)
        shares = {each.name: each.buckets for each in self.rollout.current.variants}
        counts = {name: rate * buckets // 10_000 for name, buckets in shares.items()}
        bad = {} if failed is None else {name: failed(name, count) for name, count in counts.items()}
        self.answer(counts, bad)
        return self.look()

    def look(self) -> Step:
        """Look without anything new but a worker's word that it is there."""
        self.evidence.observe(self.now_ms, 0)
        return self.take(advance(self.rollout, self.evidence, self.now_ms))

    def run(
        self, minutes: int, rate: int = 6_000, failed: Callable[[str, int], int] | None = None
    ) -> Rollout:
        """Let minutes pass until the rollout ends."""
        for _ in range(minutes):
            if self.rollout.ended:
                break
            self.minute(rate, failed)
        return self.rollout

    def phases(self) -> list[tuple[str, float]]:
        """Return the phases with their shares, as they were entered."""
        entered = [
            (step.rollout.phase, step.rollout.percent) for step in self.steps if step.route is not None
        ]
        return list(dict.fromkeys(entered))
