"""An intake that is to take from nothing: a route was taken away, or wants no retry topics any longer."""

from __future__ import annotations

from tests.contract.intake_bench import Bench
from tests.contract.test_intake_contract import bench, numbered, sorted_values

__all__ = ["bench"]


def test_who_wants_nothing_any_longer_gives_all_to_others(bench: Bench) -> None:
    """It takes nothing more, holds nothing back, hinders no idle end, and may want something again."""
    topic = bench.topic()
    bench.send(topic, 0, *numbered(4))
    one = bench.join(topic)
    bench.until_taken(one, 4)
    one.intake.settle(bench.first(4, one, topic))
    bench.until_settled(topic, 4, one)
    one.intake.subscribe([], one)
    bench.until(lambda: not one.owned, "its streams are given up", one)
    assert one.intake.joined
    assert one.intake.drained(5.0)
    bench.send(topic, 0, *numbered(3, "w"))
    other = bench.join(topic)
    bench.until(lambda: len(other.values()) == 3, "the other takes what comes now")
    assert sorted_values(one) == [b"v0", b"v1", b"v2", b"v3"]
    last = other.chunks[-1]
    other.intake.settle({last.stream: last.positions[-1] + 1})
    bench.until_settled(topic, 7, other)
    other.close()
    bench.send(topic, 0, *numbered(2, "x"))
    one.intake.subscribe([topic], one)
    bench.until(lambda: len(one.values()) == 6, "what it wants again it takes again", one)
    assert sorted_values(one)[4:] == [b"x0", b"x1"]


def test_a_close_without_sources_is_quick(bench: Bench) -> None:
    """There is nothing to settle or to leave."""
    one = bench.join(bench.topic())
    bench.until(lambda: one.owned, "it is a member", one)
    one.intake.subscribe([], one)
    bench.until(lambda: not one.owned, "its streams are given up", one)
    one.close()
