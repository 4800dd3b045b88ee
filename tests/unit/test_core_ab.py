"""A/B tests: when a look is due, who wins, and what counts as one key."""

from __future__ import annotations

import numpy as np
import pytest

from inferfleet.core import ab
from inferfleet.core.rollout import advance
from inferfleet.evidence import Values
from inferfleet.policies import Metric, parse_policy
from inferfleet.rollouts import replace
from tests.support.rollouts import Desk

POLICY = """
kind = "ab"
[ab]
keys = 1000
feedback = "kafka:clicks"
[[metric]]
name = "clicked"
{more}
"""


def desk(more: str = "") -> Desk:
    return Desk(parse_policy(POLICY.format(more=more), "policy.toml"))


def labelled(at: Desk, canary: float, control: float, count: int, metric: str = "clicked") -> None:
    """Give both arms ``count`` labels, spread over the groups of keys."""
    known = at.evidence.labels.get("control", {}).get(metric, Values()).count
    rng = np.random.default_rng([count, known])
    for arm, share in (("canary", canary), ("control", control)):
        for value in (rng.random(count) < share).tolist():
            at.evidence.label(arm, metric, float(value), int(rng.integers(128)))


def watch(at: Desk) -> None:
    at.minute(6_000)


def test_the_arms_share_everything() -> None:
    """Half each, from the first revision on."""
    at = desk()

    assert (at.rollout.phase, at.rollout.percent) == ("test", 50)
    assert [(each.name, each.version, each.buckets) for each in at.rollout.current.variants] == [
        ("control", "1", 5_000),
        ("canary", "2", 5_000),
    ]


def test_looks_come_when_enough_is_known() -> None:
    """A quarter of the planned keys each; between them nothing is decided."""
    at = desk()
    for count, looks in ((200, 0), (200, 1), (20, 1), (250, 2)):
        labelled(at, 0.5, 0.5, count)
        watch(at)
        assert len(at.rollout.looks) == looks

    assert [look.bound for look in at.rollout.looks] == pytest.approx([4.0486, 2.8628], abs=1e-3)
    assert at.rollout.phase == "test"


def test_a_winner_is_rolled_out_to_all() -> None:
    """Through the bake, as a promotion is."""
    at = desk()
    labelled(at, 0.7, 0.4, 400)
    watch(at)
    assert (at.rollout.phase, at.rollout.looks[-1].verdict) == ("bake", "better")
    at.run(100, 6_000)

    assert at.rollout.phase == "done"
    assert {each.version for each in at.rollout.current.variants} == {"2"}


def test_a_loser_leaves_the_route_as_it_was() -> None:
    """The old version has won: no failure, no promotion."""
    at = desk()
    labelled(at, 0.4, 0.7, 400)
    watch(at)

    assert (at.rollout.phase, at.rollout.current) == ("done", at.rollout.before)
    assert "version 1 stays" in at.rollout.outcome


def test_less_may_be_better() -> None:
    """A goal of ``down`` turns the verdict."""
    at = desk('goal = "down"')
    labelled(at, 0.4, 0.7, 400)
    watch(at)

    assert at.rollout.phase == "bake"


def test_without_a_winner_it_is_inconclusive() -> None:
    """At the last look nobody is better: never promoted."""
    at = desk()
    labelled(at, 0.5, 0.5, 1_500)
    watch(at)

    assert at.rollout.phase == "inconclusive"
    assert "no winner at the last look" in at.rollout.outcome
    assert [look.number for look in at.rollout.looks] == [4]


def test_without_labels_it_ends_at_its_limit() -> None:
    """Nothing waits for ever."""
    at = desk()
    at.rollout = replace(at.rollout, age_s=14 * 86_400.0)
    watch(at)

    assert at.rollout.phase == "inconclusive"


def test_a_hold_takes_no_look() -> None:
    """While keys are not split as planned, labels decide nothing."""
    at = desk()
    labelled(at, 0.7, 0.4, 400)
    at.evidence.drift = "moved"
    watch(at)

    assert (at.rollout.phase, at.rollout.looks) == ("test", ())
    assert advance(at.rollout, at.evidence, at.now_ms).rollout.phase == "test"


def test_several_primaries_share_the_level() -> None:
    """Worse in one of them is worse, however good the other is."""
    at = desk('[[metric]]\nname = "bought"')
    labelled(at, 0.7, 0.4, 400)
    labelled(at, 0.4, 0.7, 400, "bought")
    watch(at)

    assert at.rollout.looks[-1].verdict == "worse"


def test_metrics_beside_are_reported_and_decide_nothing() -> None:
    """After Benjamini and Hochberg."""
    at = desk('[[metric]]\nname = "bought"\nprimary = false')
    labelled(at, 0.5, 0.5, 400)
    labelled(at, 0.2, 0.7, 400, "bought")
    watch(at)

    assert at.rollout.looks[-1].verdict == "open"
    assert ab.beside(at.rollout, at.rollout.looks[-1]) == {"bought"}


def test_a_key_with_many_labels_is_one_key() -> None:
    """When labels of a group agree, there are as many independent ones as groups."""
    metric = Metric(name="clicked")
    single, repeated = Values(), Values()
    for index in range(6_400):
        single.add(float(index * 7919 % 100 < 50), index % 64)
        repeated.add(float(index % 64 < 32), index % 64)

    assert ab.estimate(single, metric, 0).effective > 3_000
    assert ab.estimate(repeated, metric, 0).effective < 100


def test_means_are_winsorised() -> None:
    """One enormous value does not decide; negative values are left as they are."""
    metric = Metric(name="spent", kind="mean", baseline=1)
    values = np.random.default_rng(1).lognormal(0, 0.5, 4_000)
    clean, spoiled, negative = Values(), Values(), Values()
    for index, value in enumerate(values.tolist()):
        clean.add(value, index % 128)
        spoiled.add(1e6 if index == 0 else value, index % 128)
        negative.add(-value, index % 128)
    cap = clean.values.quantile(0.999)

    assert ab.estimate(spoiled, metric, cap).value == pytest.approx(values.mean(), rel=0.02)
    assert ab.estimate(negative, metric, cap).value == pytest.approx(-values.mean(), rel=1e-9)
    assert ab.estimate(Values(), metric, cap).effective == 0


def test_the_size_is_what_the_metrics_ask_for() -> None:
    """The policy's number, or the largest that a primary metric needs."""
    at = desk()
    asked = parse_policy(POLICY.format(more="minimum_effect = 0.05").replace("keys = 1000\n", ""), "p")

    assert ab.planned_keys(at.rollout) == 1_000
    wanted = 2 * (0.5 * (2.0243 + 0.8416) / 0.05) ** 2
    assert ab.planned_keys(replace(at.rollout, policy=asked)) == pytest.approx(wanted, rel=0.01)
