"""The machine of a rollout: what it does when all goes well, and everything that may stop it."""

from __future__ import annotations

import itertools

import pytest

from inferfleet.core import rollout_verbs as verbs
from inferfleet.core.rollout import advance, begin, load_refused
from inferfleet.policies import Policy, parse_policy
from inferfleet.rollouts import Pause, RefusedError, Rollout, replace
from inferfleet.routes import parse_routes
from tests.support.rollouts import ROUTE, START, T0, Desk, window

RATE = 12_000
NO_SHADOW = "shadow.enabled = false\n"


def policy(text: str) -> Policy:
    return parse_policy(text, "policy.toml")


def in_step(text: str = NO_SHADOW, minutes: int = 3) -> Desk:
    """Return a canary some minutes into its first step."""
    desk = Desk(policy(text))
    for _ in range(minutes):
        desk.minute(RATE)
    return desk


def actions(rollout: Rollout) -> list[str]:
    return [each.action for each in rollout.history]


def test_a_good_version_goes_all_the_way() -> None:
    """Shadow, 1, 5, 25, 50 %, promotion, bake; the old version stays warm until the end."""
    desk = Desk()
    rollout = desk.run(400, RATE)

    assert desk.phases() == [
        ("shadow", 0),
        ("step", 1),
        ("step", 5),
        ("step", 25),
        ("step", 50),
        ("bake", 100),
        ("done", 100),
    ]
    assert rollout.outcome.startswith("promoted: ")
    routes = {step.rollout.phase: step.route for step in desk.steps if step.route is not None}
    assert [(each.name, each.version) for each in routes["shadow"].shadows] == [("candidate", "2")]
    assert routes["shadow"].variants == ROUTE.variants
    assert routes["bake"].warm == ("1",)
    assert routes["bake"].versions == {"1", "2"}
    assert routes["done"].warm == ()
    assert [(each.name, each.version) for each in routes["done"].variants] == [("stable", "2")]


def test_no_step_is_shorter_than_its_dwell() -> None:
    """The times between the steps are the policy's."""
    desk = Desk()
    desk.run(400, RATE)
    entered = [step.rollout.history[-1].at_ms for step in desk.steps if step.route is not None]
    spans = [(after - before) / 1_000 for before, after in itertools.pairwise(entered)]

    assert spans == [1_800, 600, 900, 1_200, 1_800, 3_600]


def test_the_control_slice_is_as_large_as_the_canary() -> None:
    """At 50 % nothing is left for the stable variant."""
    desk = Desk()
    desk.run(400, RATE)
    shares = [
        {each.name: each.buckets for each in step.route.variants}
        for step in desk.steps
        if step.route is not None and step.rollout.phase == "step"
    ]

    assert shares == [
        {"stable": 9_800, "control": 100, "canary": 100},
        {"stable": 9_000, "control": 500, "canary": 500},
        {"stable": 5_000, "control": 2_500, "canary": 2_500},
        {"control": 5_000, "canary": 5_000},
    ]


def test_a_regression_is_aborted_from_the_first_revision_on() -> None:
    """Three times the failures: the route as it was, retroactively, and for ever."""
    desk = Desk()
    rollout = desk.run(400, RATE, lambda name, count: count * (3 if name == "canary" else 1) // 100)

    assert rollout.phase == "aborted"
    assert "errors: " in rollout.outcome
    last = desk.steps[-1]
    assert (last.route, last.effect, last.effective_from_ms) == (ROUTE, "retroactive", T0)
    assert last.rollout.first_ms == T0
    desk.minute(RATE)
    assert desk.rollout == rollout
    assert desk.steps[-1] is last


def test_a_broken_version_is_aborted_without_a_test() -> None:
    """More than 5 % of 200 independent messages, whatever the control does."""
    desk = in_step(minutes=0)
    desk.minute(RATE, lambda _, count: count // 2)
    assert desk.rollout.phase == "step", "120 messages are too few"
    desk.minute(RATE, lambda _, count: count // 2)

    assert desk.rollout.phase == "aborted"
    assert "120 of 240 failed (limit 5.0%)" in desk.rollout.outcome


def test_invalid_answers_abort() -> None:
    """Three are enough where they are more than 0.1 %; two are not."""
    desk = in_step()
    for invalid, phase in ((2, "step"), (1, "aborted")):
        made = window(
            "canary", "2", requests=100, invalid=invalid, revision=desk.revisions, at_ms=desk.now_ms
        )
        desk.evidence.add(made, desk.rollout)
        desk.look()
        assert desk.rollout.phase == phase


def test_two_crashes_within_ten_minutes_abort() -> None:
    """Eleven minutes apart they do not."""
    desk = in_step()
    for minute, phase in ((0, "step"), (11, "step"), (20, "aborted")):
        made = window("canary", "2", requests=0, revision=desk.revisions, at_ms=T0 + minute * 60_000)
        made.crash = True
        desk.evidence.add(made, desk.rollout)
        desk.look()
        assert desk.rollout.phase == phase


def test_a_slow_version_is_aborted() -> None:
    """Model time 1.5 times the control's."""
    desk = in_step(minutes=0)
    for _ in range(60):
        if desk.rollout.ended:
            break
        desk.now_ms += 60_000
        for name, version, slow in (("control", "1", 1.0), ("canary", "2", 1.5)):
            made = window(name, version, requests=600, revision=desk.revisions, at_ms=desk.now_ms, slow=slow)
            desk.evidence.add(made, desk.rollout)
        desk.look()

    assert desk.rollout.phase == "aborted"
    assert "p95 compute" in desk.rollout.outcome or "cost" in desk.rollout.outcome


def test_a_shadow_that_differs_never_answers_anybody() -> None:
    """4 % changed labels block; the canary is never seen."""
    desk = Desk()
    for _ in range(40):
        if desk.rollout.ended:
            break
        desk.now_ms += 60_000
        desk.compare(1_000, 40)
        desk.look()

    assert desk.rollout.phase == "aborted"
    assert "comparison: block" in desk.rollout.outcome
    assert [phase for phase, _ in desk.phases()] == ["shadow", "aborted"]


def test_a_shadow_that_differs_may_be_let_through() -> None:
    """``stop_at = "never"`` only reports."""
    desk = Desk(policy('shadow.stop_at = "never"'))
    for _ in range(30):
        desk.now_ms += 60_000
        desk.compare(1_000, 40)
        desk.look()

    assert desk.rollout.phase == "step"


def test_a_shadow_rollout_ends_with_its_verdict() -> None:
    """Nothing is promoted; the route is as it was."""
    desk = Desk(policy('kind = "shadow"'))
    rollout = desk.run(60, RATE)

    assert (rollout.phase, rollout.current) == ("done", ROUTE)
    assert rollout.outcome.startswith("ok: ")


def test_a_quiet_topic_ends_inconclusive() -> None:
    """Too few messages: six hours in a step, then back, and never promoted."""
    desk = Desk(policy(NO_SHADOW))
    rollout = desk.run(500, 120)

    assert (rollout.phase, rollout.current) == ("inconclusive", ROUTE)
    assert "no decision in 21600 s" in rollout.outcome
    assert "independent messages" in rollout.outcome
    assert ("bake", 100) not in desk.phases()
    assert desk.steps[-1].effect == "retroactive"
    assert desk.steps[-1].effective_from_ms == desk.now_ms


def test_the_quiet_profile_waits_for_a_person() -> None:
    """It comes to the gate at 100 %, and ends inconclusive if nobody lets it pass."""
    text = 'profile = "quiet"\nshadow.enabled = false'
    waiting = Desk(policy(text))
    waiting.run(200, 60)
    assert (waiting.rollout.phase, waiting.rollout.next_percent) == ("gate", 100)
    waiting.take(verbs.approve(waiting.rollout, "bob", waiting.now_ms))
    waiting.minute(60)
    assert waiting.rollout.phase == "bake"

    alone = Desk(policy(text))
    assert alone.run(5_000, 60).phase == "inconclusive"
    assert "nobody let it pass" in alone.rollout.outcome


def test_gates_ask_for_as_many_people_as_the_policy_says() -> None:
    """Two different ones, who have seen the digest and the policy; nothing rises before."""
    desk = Desk(policy(NO_SHADOW + "critical = true\napprovals = 2"))
    desk.run(60, RATE)
    assert (desk.rollout.phase, desk.rollout.percent, desk.rollout.next_percent) == ("gate", 25, 50)

    with pytest.raises(RefusedError, match="of the bytes sha256:2, not sha256:3"):
        verbs.approve(desk.rollout, "bob", desk.now_ms, digest="sha256:3")
    with pytest.raises(RefusedError, match=r"follows the policy .*, not other"):
        verbs.approve(desk.rollout, "bob", desk.now_ms, policy="other")
    desk.take(verbs.approve(desk.rollout, "bob", desk.now_ms, digest="sha256:2"))
    with pytest.raises(RefusedError, match="bob has approved 50 % of rollout digits-1 already"):
        verbs.approve(desk.rollout, "bob", desk.now_ms)
    desk.minute(RATE)
    assert desk.rollout.phase == "gate"
    desk.take(verbs.approve(desk.rollout, "eve", desk.now_ms))
    desk.minute(RATE)

    assert (desk.rollout.phase, desk.rollout.percent) == ("step", 50)
    with pytest.raises(RefusedError, match="waits at no gate now"):
        verbs.approve(desk.rollout, "bob", desk.now_ms)
    with pytest.raises(RefusedError, match="has 0 of 2 approvals of 100 %"):
        verbs.promote(desk.rollout, "bob", "", desk.now_ms)


def test_what_ends_at_a_barrier_after_too_many_holds_says_so() -> None:
    """It was not the workers who were late: nobody has resumed it."""
    desk = in_step()
    pause = Pause(actor="", reason="3 holds in one phase, the last: stale", at_ms=desk.now_ms)
    stuck = replace(desk.rollout, effect="barrier", paused=pause, age_s=1e6)

    ended = advance(stuck, desk.evidence, desk.now_ms + 1_000).rollout

    assert ended.phase == "inconclusive"
    assert "3 holds in one phase" in ended.outcome


def test_a_promotion_by_hand_goes_round_no_gate() -> None:
    """One person alone passes neither the gate that it waits at nor one that lies before it."""
    desk = in_step(NO_SHADOW + "approvals = 2\ngate_before = [50]")
    with pytest.raises(RefusedError, match="has 0 of 2 approvals of 50 %"):
        verbs.promote(desk.rollout, "bob", "", desk.now_ms)
    desk.run(60, RATE)
    assert (desk.rollout.phase, desk.rollout.next_percent) == ("gate", 50)
    desk.take(verbs.approve(desk.rollout, "bob", desk.now_ms))
    with pytest.raises(RefusedError, match="has 1 of 2 approvals of 50 %"):
        verbs.promote(desk.rollout, "bob", "", desk.now_ms)
    desk.take(verbs.approve(desk.rollout, "eve", desk.now_ms))
    desk.minute(RATE)

    assert (desk.rollout.phase, desk.rollout.percent) == ("step", 50)
    desk.minute(RATE)
    desk.take(verbs.promote(desk.rollout, "bob", "", desk.now_ms))
    assert desk.rollout.phase == "bake"


def test_a_regression_at_a_gate_is_aborted_too() -> None:
    """Waiting for people is no reason not to look."""
    desk = Desk(policy(NO_SHADOW + "critical = true"))
    desk.run(60, RATE)
    desk.run(60, RATE, lambda name, count: count // 10 if name == "canary" else 0)

    assert desk.rollout.phase == "aborted"


@pytest.mark.parametrize("kind", ["stale", "drift", "digest", "lag", "sample ratio"])
def test_holds_keep_it_where_it_is(kind: str) -> None:
    """Each reason stops the clock of the step, and ends when it is over; nothing is aborted."""
    desk = in_step()
    watched = desk.rollout.watched_s
    for _ in range(30):
        desk.now_ms += 60_000
        desk.answer({"control": 100, "canary": 100})
        if kind == "drift":
            desk.evidence.drift = "the mean of x moved"
        if kind == "sample ratio":
            desk.evidence.first_seen[desk.revisions]["w-1"].canary += 200
        if kind == "digest":
            desk.evidence.digests = ["sha256:2", "sha256:other"]
        if kind != "stale":
            lag = desk.now_ms // 60_000 % 100 * 2_000 if kind == "lag" else 0
            desk.evidence.observe(desk.now_ms, lag)
        desk.take(advance(desk.rollout, desk.evidence, desk.now_ms))

    assert [hold.kind for hold in desk.rollout.holds] == [kind]
    assert desk.rollout.watched_s <= watched + 300
    assert (desk.rollout.phase, desk.rollout.percent) == ("step", 1)


def test_three_holds_ask_for_a_person() -> None:
    """The third pauses the rollout; resuming counts anew."""
    desk = in_step()
    for _ in range(3):
        desk.evidence.drift = "moved"
        desk.minute(RATE)
        desk.evidence.drift = ""
        desk.minute(RATE)
    assert desk.rollout.paused is not None
    assert desk.rollout.paused.actor == ""
    assert "3 holds in one phase" in desk.rollout.paused.reason
    for _ in range(30):
        desk.minute(RATE)
    assert desk.rollout.percent == 1

    desk.take(verbs.resume(desk.rollout, "bob", "looked at it", desk.now_ms))
    desk.run(400, RATE)
    assert desk.rollout.phase == "done"


def test_a_rollout_that_waits_for_a_person_does_not_wait_for_ever() -> None:
    """What the machine has paused ends at the step's limit; what a person has paused does not."""
    desk = in_step(NO_SHADOW + "[holds]\nmost = 1")
    desk.evidence.drift = "moved"
    desk.run(400, RATE)
    assert desk.rollout.phase == "inconclusive"

    by_person = in_step()
    by_person.take(verbs.pause(by_person.rollout, "bob", "lunch", by_person.now_ms))
    by_person.run(400, RATE)
    assert (by_person.rollout.phase, by_person.rollout.percent) == ("step", 1)


def test_a_pause_stops_the_clock_and_not_the_guardrails() -> None:
    """While it is paused a regression is still aborted."""
    desk = in_step()
    desk.take(verbs.pause(desk.rollout, "bob", "lunch", desk.now_ms))
    with pytest.raises(RefusedError, match="paused already, by bob"):
        verbs.pause(desk.rollout, "eve", "", desk.now_ms)
    desk.run(30, RATE)
    assert desk.rollout.percent == 1
    desk.run(30, RATE, lambda name, count: count // 3 if name == "canary" else 0)

    assert desk.rollout.phase == "aborted"


@pytest.mark.parametrize("jump_ms", [3_600_000, -3_600_000])
def test_a_jump_of_the_clock_promotes_nothing(jump_ms: int) -> None:
    """No time passes in the jump; the rollout goes on afterwards, an hour later at the latest."""
    desk = in_step()
    watched = desk.rollout.watched_s
    desk.now_ms += jump_ms
    desk.minute(RATE)

    assert desk.rollout.watched_s == watched
    assert desk.rollout.holds[0].kind == "unwatched"
    assert desk.rollout.percent == 1
    desk.run(500, RATE)
    assert desk.rollout.phase == "done"


def test_a_coordinator_that_was_away_counts_nothing() -> None:
    """Ten minutes unwatched are no dwell."""
    desk = in_step(minutes=9)
    desk.now_ms += 600_000
    desk.minute(RATE)

    assert (desk.rollout.percent, desk.rollout.watched_s) == (1, 540)


def test_nothing_moves_before_the_barrier() -> None:
    """While workers load, the step has not begun; if they never do, it ends inconclusive."""
    desk = Desk(policy(NO_SHADOW))
    waiting = replace(begin(START, ROUTE, policy(NO_SHADOW), T0).rollout)
    assert waiting.effect == "barrier"
    for minute in range(1, 362):
        desk.evidence.observe(T0 + minute * 60_000, 0)
        step = advance(waiting, desk.evidence, T0 + minute * 60_000)
        waiting = step.rollout
        if waiting.ended:
            break
        assert waiting.watched_s == 0

    assert waiting.phase == "inconclusive"
    assert "the workers were not ready in 21600 s" in waiting.outcome


def test_a_version_that_cannot_be_loaded_ends_the_rollout() -> None:
    """With the reason; nothing was in force, so the route as it was takes effect now."""
    step = load_refused(
        begin(START, ROUTE, Policy(), T0).rollout, "w-1 refuses digits:2: no such file", T0 + 5
    )

    assert (step.rollout.phase, step.route, step.effective_from_ms) == ("aborted", ROUTE, T0 + 5)
    assert "no such file" in step.rollout.outcome
    assert load_refused(step.rollout, "again", T0 + 6).route is None


def test_an_alarm_while_it_bakes_goes_back() -> None:
    """The new version answers all and begins to fail: retroactive to the first revision."""
    desk = Desk(policy(NO_SHADOW))
    desk.run(76, RATE)
    assert desk.rollout.phase == "bake"
    desk.run(30, RATE, lambda _, count: count * 8 // 100)

    assert desk.rollout.phase == "aborted"
    assert desk.steps[-1].effective_from_ms == T0


def test_blue_green_is_one_switch() -> None:
    """Shadow, then all at once, then an hour with the old version warm."""
    desk = Desk(policy('kind = "blue-green"'))
    desk.run(400, RATE)

    assert desk.phases() == [("shadow", 0), ("bake", 100), ("done", 100)]


def test_blue_green_goes_back_when_it_fails() -> None:
    """It is compared with what stable answered before."""
    desk = Desk(policy('kind = "blue-green"'))
    desk.run(31, RATE)
    assert desk.rollout.phase == "bake"
    desk.run(30, RATE, lambda _, count: count * 3 // 100)

    assert desk.rollout.phase == "aborted"
    assert "errors" in desk.rollout.outcome


def test_without_a_control_slice_stable_is_compared_with() -> None:
    """A regression is found all the same."""
    desk = Desk(policy(NO_SHADOW + "control = false"))
    desk.run(400, RATE, lambda name, count: count * (4 if name == "canary" else 1) // 100)

    assert desk.rollout.phase == "aborted"


def test_people_abort_and_promote_by_hand() -> None:
    """With their names in the history."""
    desk = in_step()
    aborted = verbs.abort(desk.rollout, "bob", "I have seen enough", desk.now_ms)
    promoted = verbs.promote(desk.rollout, "bob", "it is urgent", desk.now_ms)

    assert (aborted.rollout.phase, aborted.effective_from_ms) == ("aborted", T0)
    assert (promoted.rollout.phase, promoted.effect) == ("bake", "barrier")
    assert aborted.rollout.history[-1].actor == promoted.rollout.history[-1].actor == "bob"
    with pytest.raises(RefusedError, match="has ended \\(aborted\\) and cannot be paused"):
        verbs.pause(aborted.rollout, "bob", "", desk.now_ms)
    with pytest.raises(RefusedError, match="is promoted already and bakes"):
        verbs.promote(promoted.rollout, "bob", "", desk.now_ms)
    with pytest.raises(RefusedError, match="is not paused"):
        verbs.resume(desk.rollout, "bob", "", desk.now_ms)


def test_what_cannot_be_promoted_by_hand() -> None:
    """A shadow never; nothing while workers still load."""
    shadow = Desk(policy('kind = "shadow"'))
    with pytest.raises(RefusedError, match="only shadows"):
        verbs.promote(shadow.rollout, "bob", "", T0)
    with pytest.raises(RefusedError, match="waits for the workers"):
        verbs.promote(begin(START, ROUTE, Policy(), T0).rollout, "bob", "", T0)


def test_what_cannot_begin() -> None:
    """A route of two versions, and a version that answers already."""
    text = (
        '[[route]]\nname = "digits"\nsource = "kafka:in"\nresults = ["redis"]\nmodel = "digits"\n'
        'variants = [{ name = "a", version = "1", weight = 1 }, { name = "b", version = "2", weight = 1 }]'
    )
    with pytest.raises(RefusedError, match="route digits is answered by versions 1, 2"):
        begin(START, parse_routes(text, "fleet", "routes.toml").routes[0], Policy(), T0)
    with pytest.raises(RefusedError, match="route digits is answered by version 1 already"):
        begin(START._replace(to_version="1"), ROUTE, Policy(), T0)


def test_the_history_is_bounded_and_says_who() -> None:
    """The first decision is the person's who began it."""
    desk = in_step()
    for index in range(300):
        pause = verbs.pause if index % 2 == 0 else verbs.resume
        desk.take(pause(desk.rollout, "bob", "", desk.now_ms))

    assert len(desk.rollout.history) == 200
    assert Desk().rollout.history[0].actor == "ada"
    assert set(actions(desk.rollout)) == {"pause", "resume"}
