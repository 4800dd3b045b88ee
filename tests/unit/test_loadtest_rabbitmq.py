"""Load tests on RabbitMQ: what is planned, what the figures say, and what a worker is told."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

pytest.importorskip("hdrh")

from loadtest import rabbitdrain, subjects
from loadtest.drain import Drain
from loadtest.ledger import Tally
from loadtest.rabbit import Ends, Rabbit
from loadtest.rabbitloop import Course, Incident, RabbitPlan, shortfalls
from loadtest.workloads import TINY, write_fleet

CLEAN = Tally(sent=10, answered=10, lost=0, duplicates=0, unequal=0, wrong=0, foreign=0)


def incident(at_s: float, over_s: float | None = None, *, node: bool = False, **more: float) -> Incident:
    given = {"sent": 10, "outcomes": 5, "unanswered": 5, **more}
    return Incident("x", at_s, 10.0, over_s=at_s if over_s is None else over_s, node=node, **given)


def test_a_plan_sends_exactly_its_count() -> None:
    """Whatever rate and count are, and also with random gaps, as many requests are due as were asked for."""
    for plan in (RabbitPlan(1000, 300), RabbitPlan(999, 7.7), RabbitPlan(1000, 300, poisson=True)):
        times = plan.times()
        assert len(times) == plan.count
        assert (times[1:] >= times[:-1]).all()


def test_workers_go_at_every_interval_and_the_node_at_even_ones_in_turn_stopped_and_killed() -> None:
    """The node's restarts divide the time; nothing is planned at its very end."""
    plan = RabbitPlan(count=300, rate=10, kill_every=10, restart_node=2)
    assert plan.moments() == [(10, "stop"), (10, "worker"), (20, "kill"), (20, "worker")]
    assert RabbitPlan(count=300, rate=10).moments() == []


def test_a_silence_after_a_worker_leaves_out_the_time_without_a_node() -> None:
    """From the node's going to the first outcome after its return, nobody could answer."""
    course = Course(incidents=[incident(2), incident(4, 9, node=True), incident(5), incident(13)])
    for at_s, outcomes in [(1.0, 1), (2.5, 2), (3.9, 3), (11.0, 4), (12.0, 5), (16.0, 6)]:
        course.look(at_s, outcomes)
        course.look(at_s + 0.1, None)

    course.settle(20)

    assert [each.silence_s for each in course.incidents] == pytest.approx([1.4, 2.0, 1.0, 4.0])


def test_a_node_after_which_nothing_comes_is_silent_to_the_end() -> None:
    """No outcome after the return is not the same as one at once."""
    course = Course(incidents=[incident(4, 6, node=True)])
    course.look(1.0, 1)
    course.settle(50)
    assert course.incidents[0].silence_s == 44


def test_copies_do_not_hide_what_was_unanswered() -> None:
    """Of the outcomes seen at an incident, only the first of each request answers one."""
    course = Course(incidents=[incident(1, sent=4, outcomes=3), incident(2, sent=4, outcomes=5)])
    course.count_unanswered([0, 1, 0, 2, 3])
    assert [each.unanswered for each in course.incidents] == [2, 0]


def test_every_promise_that_does_not_hold_is_named() -> None:
    """Loss, changed copies, wrong answers, leftovers, bad exits, silences, idle incidents; not copies."""
    assert shortfalls(CLEAN._replace(duplicates=3), Course(), {"q": 0}, [0, 0], 0) == []
    course = Course(incidents=[incident(1, unanswered=0, silence_s=10.5)])
    bad = CLEAN._replace(lost=1, unequal=2, wrong=3, foreign=4)

    found = shortfalls(bad, course, {"q": 5, "r": 0}, [0, -9], 6)

    assert found == [
        "1 requests without an outcome",
        "2 requests with differing copies",
        "3 wrong answers",
        "4 outcomes of requests that nobody sent",
        "6 requests that no queue took",
        "1 drained workers that did not exit 0",
        "5 messages left in q",
        "x: silence of 10.5 s, limit 10 s",
        "x: nothing was in flight, so it shows nothing",
    ]


def test_the_ratio_is_to_aio_pika_with_pika_beside_it() -> None:
    """The worker's own library is the yardstick; the other one stands beside it for the reader."""
    rates = {subjects.WORKER: 60.0, rabbitdrain.AIO_PIKA: 100.0, rabbitdrain.PIKA: 200.0}
    done = [Drain(name, 1000, rate, rate, rate, 1.0, 0) for name, rate in rates.items()]

    found = rabbitdrain.summarised("tiny", done)

    assert (found["ratio"], found["to_pika"]["ratio"]) == (0.6, 0.3)
    assert "inferfleet / bare aio-pika: 0.60" in rabbitdrain.shown(found)
    alone = rabbitdrain.summarised("tiny", done[:1])
    assert "/" not in rabbitdrain.shown(alone)


def test_a_worker_is_told_of_queue_exchange_and_node(tmp_path: Path) -> None:
    """The files name RabbitMQ alone, in the contract's words, and what belongs to the source is derived."""
    ends = Ends("in", "out.1")
    fleet = rabbitdrain.fleet_of(TINY, Rabbit("amqp://h/"), ends, tmp_path)

    path = write_fleet(fleet, tmp_path)

    settings, routes = tomllib.loads(path.read_text()), tomllib.loads((tmp_path / "routes.toml").read_text())
    assert settings["rabbitmq"] == {"url": "amqp://h/"}
    assert "kafka" not in settings
    (route,) = routes["route"]
    assert (route["source"], route["results"]) == ("rabbitmq:in", ["rabbitmq:out.1.exchange/out.1"])
    assert fleet.derived[0] == f"in.{fleet.name}.default.dlt"
    assert fleet.derived[-1] == f"in.{fleet.name}.default.retry.ready"
