"""Policies: how a new version of a model is let onto a route, and what stops it; parsed from ``policy.toml``.

Every number of a policy is a choice, never a constant of the code; ``docs/policies.md`` says what each is for
and why it has its default. Spans are seconds, shares are 0 to 1, and percents are those of all buckets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from inferfleet import tables
from inferfleet.errors import ConfigError
from inferfleet.tables import Leaf

Kind: TypeAlias = Literal["canary", "blue-green", "ab", "shadow"]
Profile: TypeAlias = Literal["default", "quiet"]

Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=90 * 86_400)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Chance: TypeAlias = Annotated[float, Meta(gt=0, lt=0.5)]
Ratio: TypeAlias = Annotated[float, Meta(ge=1, le=1_000)]
Percent: TypeAlias = Annotated[float, Meta(gt=0, lt=100)]
MetricName: TypeAlias = Annotated[
    str,
    Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,62}\Z", description="a metric's name, at most 63 characters"),
]


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a canary: its share, how long it stays at least, and how many messages it needs.

    ``minimum`` counts messages that are independent of each other: a batch whose members share their fate
    counts for less than its size.
    """

    percent: Percent
    dwell_s: Seconds
    minimum: Count


class ShadowPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The stage in which the new version sees the traffic and answers nobody.

    ``stop_at`` is the verdict on the compared answers that ends the rollout: block, warn or never.
    """

    enabled: bool = True
    sample: Annotated[float, Meta(gt=0, le=1)] = 1.0
    secondary: Share = 0.05
    duration_s: Seconds = 1_800
    minimum_pairs: Count = 5_000
    stop_at: Literal["block", "warn", "never"] = "block"


class Guardrails(msgspec.Struct, frozen=True, kw_only=True):
    """What ends a rollout by a test: how much worse than the control slice the new version may be."""

    alpha: Chance = 0.005
    tuning_messages: Annotated[int, Meta(ge=100, le=1_000_000_000)] = 5_000
    error_points: Annotated[float, Meta(ge=0, le=100)] = 0.5
    error_ratio: Ratio = 1.25
    p95_compute_ratio: Ratio = 1.20
    p95_latency_ratio: Ratio = 1.25
    p99_latency_ratio: Ratio = 1.5
    cost_ratio: Ratio = 1.30


class Aborts(msgspec.Struct, frozen=True, kw_only=True):
    """What ends a rollout without a test."""

    crashes: Annotated[int, Meta(ge=1)] = 2
    crash_window_s: Seconds = 600
    invalid_share: Share = 0.001
    invalid_messages: Annotated[int, Meta(ge=1)] = 3
    error_share: Share = 0.05
    error_messages: Annotated[int, Meta(ge=1)] = 200


class Holds(msgspec.Struct, frozen=True, kw_only=True):
    """What keeps a rollout where it is, and how often before a person has to look."""

    most: Annotated[int, Meta(ge=1, le=1_000)] = 3
    srm_p: Chance = 0.001
    srm_keys: Annotated[int, Meta(ge=1)] = 8
    lag_windows: Annotated[int, Meta(ge=2, le=20)] = 3
    lag_records: Count = 1_000
    stale_s: Annotated[float, Meta(ge=1, le=86_400)] = 120


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """A value of the feedback topic that a rollout is judged by; a proportion's values are 0 to 1.

    For an A/B test ``minimum_effect`` is the difference worth finding, in the metric's own unit; with
    ``baseline`` (a proportion, or a mean's standard deviation) it says how many keys each arm needs. For a
    canary or a switch ``margin`` is how much worse than the old version the new one may be, in the metric's
    own unit; a canary's step waits until both arms have ``minimum_labels`` independent ones.
    """

    name: MetricName
    kind: Literal["proportion", "mean"] = "proportion"
    goal: Literal["up", "down"] = "up"
    primary: bool = True
    baseline: Annotated[float, Meta(ge=0)] = 0.5
    minimum_effect: Annotated[float, Meta(gt=0)] = 0.02
    margin: Annotated[float, Meta(ge=0)] = 0.02
    minimum_labels: Count = 0


class AbTest(msgspec.Struct, frozen=True, kw_only=True):
    """An A/B test: both versions answer until labels say which is better, or the last look says neither.

    ``output`` is for the metric ``accuracy``: the output whose largest entry is a row's class, by default the
    first one of an answer.
    """

    share: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    alpha: Chance = 0.05
    power: Annotated[float, Meta(ge=0.5, lt=1)] = 0.8
    looks: Annotated[int, Meta(ge=1, le=10)] = 4
    keys: Count = 0
    horizon_s: Seconds = 86_400
    limit_s: Seconds = 14 * 86_400
    feedback: str = ""
    output: str = ""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How a rollout goes on, what it waits for and what ends it."""

    kind: Kind = "canary"
    profile: Profile = "default"
    critical: bool = False
    control: bool = True
    approvals: Annotated[int, Meta(ge=1, le=2)] = 1
    gate_before: tuple[Annotated[float, Meta(gt=0, le=100)], ...] = ()
    step_limit_s: Seconds = 21_600
    gate_limit_s: Seconds = 86_400
    bake_s: Seconds = 3_600
    steps: tuple[StepPlan, ...] = ()
    shadow: ShadowPlan = ShadowPlan()
    guardrails: Guardrails = Guardrails()
    aborts: Aborts = Aborts()
    holds: Holds = Holds()
    ab: AbTest = AbTest()
    metrics: tuple[Metric, ...] = ()
    feedback: str = ""
    feedback_output: str = ""
    feedback_horizon_s: Seconds = 86_400

    @property
    def feedback_topic(self) -> str:
        """Where labels come from, as ``kafka:TOPIC``; empty where nothing is judged by labels."""
        return self.feedback or self.ab.feedback

    @property
    def label_output(self) -> str:
        """The output that the metric ``accuracy`` is computed from; empty: an answer's first one."""
        return self.feedback_output or self.ab.output

    @property
    def label_horizon_s(self) -> float:
        """How far a label may be from its answer, in seconds."""
        return self.ab.horizon_s if self.kind == "ab" else self.feedback_horizon_s

    @property
    def hash(self) -> str:
        """A hash of what the policy means, to which approvals are bound."""
        # Read back once, so that 600 and 600.0 are the same policy.
        plain = msgspec.json.decode(msgspec.json.encode(self), type=Policy)
        return hashlib.sha256(msgspec.json.encode(plain, order="sorted")).hexdigest()[:16]


CANARY_STEPS = (
    StepPlan(percent=1, dwell_s=600, minimum=1_000),
    StepPlan(percent=5, dwell_s=900, minimum=2_000),
    StepPlan(percent=25, dwell_s=1_200, minimum=3_000),
    StepPlan(percent=50, dwell_s=1_800, minimum=5_000),
)
QUIET_STEPS = (
    StepPlan(percent=10, dwell_s=3_600, minimum=100),
    StepPlan(percent=50, dwell_s=3_600, minimum=300),
)
_USUAL: dict[str, Any] = {"gate_before": (), "step_limit_s": 21_600.0, "gate_limit_s": 86_400.0}
_QUIET: dict[str, Any] = {"gate_before": (100.0,), "step_limit_s": 86_400.0, "gate_limit_s": 3 * 86_400.0}
_TABLES: dict[str, Any] = {
    "shadow": ShadowPlan,
    "guardrails": Guardrails,
    "aborts": Aborts,
    "holds": Holds,
    "ab": AbTest,
}
_LISTS: dict[str, Any] = {"step": StepPlan, "metric": Metric}
_JUDGED: tuple[str, ...] = ("canary", "blue-green", "ab")
_ONLY: dict[str, tuple[str, ...]] = {
    "step": ("canary",),
    "ab": ("ab",),
    "metric": _JUDGED,
    "feedback": _JUDGED,
    "feedback_output": _JUDGED,
    "feedback_horizon_s": ("canary", "blue-green"),
    "gate_before": ("canary", "blue-green"),
}
_ONLY_IN_METRIC: dict[str, tuple[str, ...]] = {
    "primary": ("ab",),
    "baseline": ("ab",),
    "minimum_effect": ("ab",),
    "margin": ("canary", "blue-green"),
    "minimum_labels": ("canary",),
}


class _Top(msgspec.Struct, kw_only=True):
    """The keys of a policy that stand outside of a table."""

    kind: Kind = "canary"
    profile: Profile = "default"
    critical: bool = False
    control: bool = True
    approvals: Annotated[int, Meta(ge=1, le=2)] = 1
    gate_before: tuple[Annotated[float, Meta(gt=0, le=100)], ...] | None = None
    step_limit_s: Seconds | None = None
    gate_limit_s: Seconds | None = None
    bake_s: Seconds = 3_600
    feedback: str = ""
    feedback_output: str = ""
    feedback_horizon_s: Seconds = 86_400


def load_policy(path: Path) -> Policy:
    """Return the policy of a file; anything wrong raises ConfigError with the file and the key."""
    return parse_policy(tables.read_text(path, "policy file"), str(path))


def parse_policy(text: str, origin: str) -> Policy:
    """Return the policy of a TOML document; ``origin`` names it in errors."""
    return policy_of(tables.parse_toml(text, origin), origin)


def default_policy(kind: Kind = "canary", profile: Profile = "default") -> Policy:
    """Return the policy of an empty file of that kind and profile."""
    return policy_of({"kind": kind, "profile": profile}, "the default policy", complete=False)


def policy_of(tree: Mapping[str, Any], origin: str, *, complete: bool = True) -> Policy:
    """Return the policy of a parsed document; anything wrong raises ConfigError.

    Without ``complete`` what only a person can say (an A/B test's metrics) may be missing.
    """
    plain = {key: Leaf(value, origin) for key, value in tree.items() if key not in (*_TABLES, *_LISTS)}
    top = tables.build(_Top, plain, "policy", extra=(*_TABLES, *_LISTS), origin=origin)
    for key, kinds in _ONLY.items():
        if key in tree and top.kind not in kinds:
            raise ConfigError(f'{origin}: policy {key} is for kind {" or ".join(kinds)}, not "{top.kind}"')
    parts: dict[str, Any] = {key: _table(tree.get(key, {}), key, origin, top) for key in _TABLES}
    lists = {key: _list(tree.get(key), key, origin) for key in _LISTS}
    _check_metric_keys(tree.get("metric", ()), top.kind, origin)
    quiet = top.profile == "quiet"
    defaults = _QUIET if quiet else _USUAL
    if top.critical and top.kind in ("canary", "blue-green"):
        defaults = defaults | {
            "gate_before": (50.0, 100.0) if top.kind == "canary" and not quiet else (100.0,)
        }
    if top.kind not in ("canary", "blue-green"):
        defaults = defaults | {"gate_before": ()}
    steps: tuple[Any, ...] = lists["step"] or (QUIET_STEPS if quiet else CANARY_STEPS)
    policy = Policy(
        kind=top.kind,
        profile=top.profile,
        critical=top.critical,
        control=top.control,
        approvals=top.approvals,
        bake_s=top.bake_s,
        steps=steps if top.kind == "canary" else (),
        metrics=lists["metric"],
        feedback=top.feedback,
        feedback_output=top.feedback_output,
        feedback_horizon_s=top.feedback_horizon_s,
        **{key: value if getattr(top, key) is None else getattr(top, key) for key, value in defaults.items()},
        **parts,
    )
    _check(policy, origin, complete)
    return policy


def _table(written: Any, key: str, origin: str, top: _Top) -> Any:
    if not isinstance(written, Mapping):
        raise ConfigError(f"{origin}: policy {key} is a table, [{key}]")
    leaves = {name: Leaf(value, origin) for name, value in written.items()}
    if key == "shadow":
        if top.profile == "quiet":
            leaves.setdefault("minimum_pairs", Leaf(500, origin))
        if top.kind == "ab":
            leaves.setdefault("enabled", Leaf(False, origin))
    return tables.build(_TABLES[key], leaves, f"policy [{key}]", origin=origin)


def _list(written: Any, key: str, origin: str) -> tuple[Any, ...]:
    if written is None:
        return ()
    if not isinstance(written, list) or not all(isinstance(each, Mapping) for each in written) or not written:
        raise ConfigError(f"{origin}: policy {key}s are tables, written [[{key}]]")
    return tuple(
        tables.build(
            _LISTS[key],
            {name: Leaf(value, origin) for name, value in each.items()},
            f"policy [[{key}]] number {index}",
            origin=origin,
        )
        for index, each in enumerate(written, 1)
    )


def _check(policy: Policy, origin: str, complete: bool) -> None:
    """Refuse what is right key by key and wrong together."""
    percents = [step.percent for step in policy.steps]
    if any(after <= before for before, after in pairwise(percents)):
        raise ConfigError(f"{origin}: policy [[step]] percent must rise from step to step")
    if policy.control and any(percent > 50 for percent in percents):
        raise ConfigError(
            f"{origin}: policy [[step]] percent is at most 50, for the control slice is as large; "
            "control = false lifts that"
        )
    known = [*percents, 100.0]
    for percent in policy.gate_before:
        if percent not in known:
            shown = ", ".join(f"{each:g}" for each in known)
            raise ConfigError(f"{origin}: policy gate_before {percent:g} is no step; there are {shown}")
    if policy.kind == "shadow" and not policy.shadow.enabled:
        raise ConfigError(f'{origin}: policy [shadow] enabled must be true for kind "shadow"')
    _check_metrics(policy.metrics, origin)
    _check_feedback(policy, origin, complete)


def _check_feedback(policy: Policy, origin: str, complete: bool) -> None:
    if policy.kind == "ab" and complete and not any(metric.primary for metric in policy.metrics):
        raise ConfigError(f"{origin}: policy needs a [[metric]] with primary = true to judge by")
    for key in ("feedback", "output"):
        top = "feedback" if key == "feedback" else "feedback_output"
        if getattr(policy, top) and getattr(policy.ab, key):
            raise ConfigError(f"{origin}: policy {top} and [ab] {key} say the same; leave one of them out")
    needed = policy.metrics and (complete or policy.kind != "ab")
    topic = policy.feedback_topic
    if (topic or needed) and (not topic.startswith("kafka:") or len(topic) <= len("kafka:")):
        key = "[ab] feedback" if policy.kind == "ab" and not policy.feedback else "feedback"
        raise ConfigError(f'{origin}: policy {key} must be "kafka:TOPIC", where the labels come from')


def _check_metric_keys(written: Sequence[Mapping[str, Any]], kind: Kind, origin: str) -> None:
    """Refuse what a metric says and a rollout of this kind would leave out of account."""
    for index, each in enumerate(written, 1):
        for key, kinds in _ONLY_IN_METRIC.items():
            if key in each and kind not in kinds:
                raise ConfigError(
                    f"{origin}: policy [[metric]] number {index} {key} is for kind {' or '.join(kinds)}, "
                    f'not "{kind}"'
                )


def _check_metrics(metrics: Sequence[Metric], origin: str) -> None:
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'{origin}: policy has two [[metric]] named "{name}"')
    for metric in metrics:
        if metric.kind == "proportion" and metric.baseline > 1:
            raise ConfigError(
                f'{origin}: policy [[metric]] "{metric.name}" baseline is a proportion, 0 to 1, not '
                f"{metric.baseline:g}"
            )
