"""How rollouts look on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inferfleet.coordinator.messages import RolloutView

MOST_HISTORY = 12


def list_lines(views: Sequence[RolloutView]) -> list[str]:
    """Return a table of rollouts, newest first."""
    if not views:
        return ["there is no rollout; `inferfleet rollout start ROUTE --to VERSION` begins one"]
    rows = [
        (
            each.id,
            each.route,
            each.kind,
            f"{each.from_version} -> {each.to_version}",
            each.phase,
            f"{each.percent:g} %",
            moment(each.begun_ms),
            each.outcome or "; ".join(each.waits_for),
        )
        for each in views
    ]
    return table(("id", "route", "kind", "versions", "phase", "share", "begun", "outcome or waits for"), rows)


def rollout_lines(view: RolloutView, now_ms: int) -> list[str]:
    """Return all of one rollout: where it stands, what it waits for, its arms, findings and decisions."""
    return [*_head(view, now_ms), *_arms(view.evidence), *_labels(view), *_findings(view), *_history(view)]


def _head(view: RolloutView, now_ms: int) -> Iterator[str]:
    yield f"rollout {view.id}: {view.kind} of {view.model} {view.to_version} over {view.from_version}"
    steps = view.policy.get("steps") or ()
    step = f", step {view.step + 1} of {len(steps)}" if view.phase == "step" and steps else ""
    watched = view.evidence.get("watched_s", 0)
    since = (now_ms - view.since_ms) / 1000
    yield f"phase   {view.phase}{step}, {view.percent:g} %, for {since:.0f} s, watched {watched:.0f} s"
    if view.phase == "gate":
        yield f"next    {view.next_percent:g} %"
    shares = view.evidence.get("shares", {})
    yield "shares  " + ", ".join(f"{name} {share:g} %" for name, share in shares.items())
    yield f"begun   {moment(view.begun_ms)} by {view.actor}{f': {view.reason}' if view.reason else ''}"
    yield f"bytes   {view.digest[:16]}  policy {view.policy_hash}"
    if view.outcome:
        yield f"outcome {view.outcome}"
    for index, each in enumerate(view.waits_for):
        yield f"{'waits   ' if not index else '        '}{each}"


def _arms(evidence: Mapping[str, Any]) -> list[str]:
    arms = evidence.get("arms", {})
    if not arms:
        return []
    rows = [
        (
            name,
            str(arm["requests"]),
            f"{arm['failed']:g}",
            f"{arm['failed_share']:.3%}",
            str(arm["invalid"]),
            str(arm["dead_letters"]),
            f"{arm['p95_compute_ms']:.3g}",
            f"{arm['p95_latency_ms']:.3g}",
            f"{arm['p99_latency_ms']:.3g}",
        )
        for name, arm in arms.items()
    ]
    headings = ("arm", "answered", "failed", "share", "invalid", "letters", "p95 run", "p95 ms", "p99 ms")
    lines = ["", *table(headings, rows)]
    for key in ("comparison", "secondary"):
        if key in evidence:
            found = evidence[key]
            lines.append(
                f"{key}: {found['pairs']} pairs of {found['kind']}, {found['identical']} identical, "
                f"{found['close']} close, {found['different']} different"
            )
    return lines


def _labels(view: RolloutView) -> list[str]:
    labels = view.evidence.get("labels", {})
    if not labels:
        return []
    rows = [
        (metric, arm, str(found["count"]), f"{found['mean']:.4g}")
        for arm, metrics in labels.items()
        for metric, found in metrics.items()
    ]
    lines = ["", *table(("metric", "arm", "labels", "mean"), sorted(rows)), *_metrics(view)]
    lines += [
        f"look {each['number']}: bound {each['bound']:.2f}, "
        + ", ".join(f"{name} z {z:.2f}" for name, z in each["z"].items())
        for each in view.evidence.get("looks", ())
    ]
    return lines


def _metrics(view: RolloutView) -> list[str]:
    """Return each metric's difference with the bound that it may not pass; above 0 is worse."""
    metrics = view.evidence.get("metrics", ())
    rows = [
        (
            each["name"],
            f"{each['arm']} against {each['against']}",
            " and ".join(str(count) for count in each["labels"]),
            *(_signed(each[key]) for key in ("worse_by", "at_least")),
            f"{each['margin']:g}",
            "passed" if each["passed"] else "kept",
        )
        for each in metrics
    ]
    headings = ("metric", "compared", "independent", "worse by", "at least", "margin", "is")
    return ["", *table(headings, rows)] if rows else []


def _signed(value: float | None) -> str:
    return "too little yet" if value is None else f"{value:+.3g}"


def _findings(view: RolloutView) -> list[str]:
    findings = view.evidence.get("findings", ())
    if not findings or view.ended:
        return []
    return ["", *table(("looked at", "verdict", "found"), [tuple(each.values()) for each in findings])]


def _history(view: RolloutView) -> list[str]:
    rows = [
        (
            moment(each.at_ms),
            each.action,
            f"{each.percent:g} %",
            each.actor or "coordinator",
            each.reason,
        )
        for each in view.history[-MOST_HISTORY:]
    ]
    return ["", *table(("at", "decision", "share", "by", "why"), rows)] if rows else []


def moment(at_ms: int) -> str:
    """Return an instant in UTC, to the second."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines under headings."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in ([heading.upper() for heading in headings], *rows)
    ]
