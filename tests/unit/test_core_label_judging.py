"""Guardrails by labels: a broken version is found, and chance alone ends hardly any good one."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.core import judging
from inferfleet.core.label_judging import judged, label_guardrails, lacking_labels
from inferfleet.evidence import CANARY, CONTROL, Evidence
from inferfleet.policies import Policy, parse_policy
from inferfleet.rollouts import Rollout, replace
from tests.support.rollouts import Desk

CANARY_POLICY = """
feedback = "kafka:labels"
shadow.enabled = false
[guardrails]
alpha = {alpha}
tuning_messages = 500
[[metric]]
name = "correct"
kind = "{kind}"
goal = "{goal}"
margin = {margin}
"""
LOOKS = range(50, 1_051, 50)


class Arms(NamedTuple):
    """How a metric is drawn in both arms, and how large groups of keys are that share their fate."""

    canary: float
    control: float
    together: int = 1


def rollout_of(text: str, **changes: object) -> Rollout:
    """Return a rollout under way whose policy is ``text``."""
    return replace(Desk(parse_policy(text, "policy.toml")).rollout, **changes)


def canary(
    *, alpha: float = 0.005, kind: str = "proportion", goal: str = "up", margin: float = 0.05
) -> Rollout:
    """Return a canary that is judged by one metric."""
    return rollout_of(CANARY_POLICY.format(alpha=alpha, kind=kind, goal=goal, margin=margin))


def ever_ended(rollout: Rollout, arms: Arms, seed: int) -> bool:
    """Say whether any of the looks at labels that come one by one would end the rollout."""
    rng = random.Random(seed)
    evidence = Evidence()
    fates: dict[tuple[str, int], float] = {}
    known = 0
    for look in LOOKS:
        for number in range(known, look):
            for arm, share in ((CANARY, arms.canary), (CONTROL, arms.control)):
                key = number // arms.together
                fate = fates.setdefault((arm, key), float(rng.random() < share))
                evidence.label(arm, "correct", fate, key % 128)
        known = look
        if any(each.verdict == "abort" for each in label_guardrails(rollout, evidence)):
            return True
    return False


@pytest.mark.parametrize(
    ("kind", "goal", "arms"),
    [
        ("proportion", "up", Arms(canary=0.9, control=0.9)),
        ("proportion", "up", Arms(canary=0.85, control=0.9)),
        ("proportion", "down", Arms(canary=0.15, control=0.1)),
        ("mean", "up", Arms(canary=0.45, control=0.5)),
        ("proportion", "up", Arms(canary=0.85, control=0.9, together=10)),
    ],
    ids=["equal", "on the margin", "down, on the margin", "a mean on the margin", "keys share their fate"],
)
def test_chance_ends_no_more_good_versions_than_alpha(kind: str, goal: str, arms: Arms) -> None:
    """Over all looks of a rollout, even where the new version lies exactly on its margin.

    The metric has a ninth of alpha, 5 %: of 80 rollouts 4 are expected at most, and more than 10 in one of
    three hundred such tests.
    """
    rollout = canary(alpha=0.45, kind=kind, goal=goal)

    ended = sum(ever_ended(rollout, arms, seed) for seed in range(80))

    assert ended <= 10


@pytest.mark.parametrize(
    ("goal", "arms"),
    [
        ("up", Arms(canary=0.6, control=0.9)),
        ("down", Arms(canary=0.4, control=0.1)),
        ("up", Arms(canary=0.1, control=1.0)),
    ],
)
def test_a_version_that_answers_wrongly_is_ended(goal: str, arms: Arms) -> None:
    """Without a single error, at the usual alpha, whichever way is good."""
    rollout = canary(goal=goal)

    assert all(ever_ended(rollout, arms, seed) for seed in range(20))
    assert not any(ever_ended(rollout, Arms(arms.control, arms.canary), seed) for seed in range(20))


@given(values=st.lists(st.floats(0, 1), min_size=0, max_size=200), groups=st.integers(1, 40))
def test_the_same_labels_in_both_arms_end_nothing(values: list[float], groups: int) -> None:
    """Whatever they are, and wherever they come from."""
    evidence = Evidence()
    for number, value in enumerate(values):
        for arm in (CANARY, CONTROL):
            evidence.label(arm, "correct", value, number % groups)

    for kind in ("proportion", "mean"):
        for goal in ("up", "down"):
            (finding,) = label_guardrails(canary(kind=kind, goal=goal, margin=0), evidence)
            assert finding.verdict != "abort"


def labelled(**arms: tuple[int, float]) -> Evidence:
    """Return evidence with so many labels in each arm, of which a share is right."""
    evidence = Evidence()
    for arm, (count, share) in arms.items():
        for number in range(count):
            evidence.label(arm, "correct", float(number < share * count), number % 128)
    return evidence


def test_labels_of_the_stable_variant_do_not_count_beside_a_control_slice() -> None:
    """Only what was answered beside the canary, on a slice of its size, is compared with it."""
    evidence = labelled(canary=(1_000, 0.5), stable=(1_000, 0.95))

    (finding,) = label_guardrails(canary(), evidence)
    (without,) = label_guardrails(
        rollout_of(
            "control = false\n" + CANARY_POLICY.format(alpha=0.005, kind="proportion", goal="up", margin=0.05)
        ),
        evidence,
    )

    assert (finding.verdict, without.verdict) == ("wait", "abort")


def test_a_switch_is_compared_with_what_the_version_before_had_answered() -> None:
    """In the bake; and where there is nothing to compare with, that is said and nothing is done."""
    text = 'kind = "blue-green"\n' + CANARY_POLICY.format(
        alpha=0.005, kind="proportion", goal="up", margin=0.05
    )
    switch = rollout_of(text, phase="bake")

    (broken,) = label_guardrails(switch, labelled(stable=(500, 0.95), baked=(500, 0.3)))
    (good,) = label_guardrails(switch, labelled(stable=(500, 0.95), baked=(500, 0.94)))
    (alone,) = label_guardrails(switch, labelled(baked=(500, 0.3)))

    assert [broken.verdict, good.verdict, alone.verdict] == ["abort", "pass", "wait"]
    assert "nothing to compare with" in alone.text
    assert label_guardrails(replace(switch, phase="gate"), labelled(stable=(500, 0.95))) == []


def test_a_metric_takes_its_share_of_alpha() -> None:
    """Eight guardrails and each metric share it evenly; an A/B test's metrics have looks of their own."""
    two = (
        CANARY_POLICY.format(alpha=0.01, kind="proportion", goal="up", margin=0.05)
        + '[[metric]]\nname = "b"\n'
    )

    def alpha(text: str) -> float:
        return judging.alpha_of_each(parse_policy(text, "policy.toml"))

    assert alpha("[guardrails]\nalpha = 0.01") == pytest.approx(0.01 / 8)
    assert alpha(two) == pytest.approx(0.01 / 10)
    assert judging.alpha_of_each(Policy(kind="ab", metrics=canary().policy.metrics)) == pytest.approx(
        0.005 / 8
    )


def test_a_step_waits_for_labels_where_it_is_asked_to() -> None:
    """Both arms need them; labels of one key count as one."""
    text = CANARY_POLICY.format(alpha=0.005, kind="proportion", goal="up", margin=0.05)
    waiting = rollout_of(text + "minimum_labels = 300\n")

    assert lacking_labels(rollout_of(text), Evidence()) == ""
    assert lacking_labels(waiting, labelled(canary=(400, 0.9), control=(400, 0.9))) == ""
    assert "of 300 independent labels of correct" in lacking_labels(
        waiting, labelled(canary=(400, 0.9), control=(100, 0.9))
    )


def test_the_bounds_are_shown_in_the_metrics_own_unit() -> None:
    """How much worse it is, and how much at least."""
    (found,) = judged(canary(), labelled(canary=(2_000, 0.5), control=(2_000, 0.9)))

    assert found.worse_by == pytest.approx(0.4)
    assert 0.2 < found.at_least < 0.4
    assert found.test.passed
