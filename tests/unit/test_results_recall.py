"""What is remembered of confirmed results, and what is asked of a Redis that was connected anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from inferfleet.results.recall import Recall
from inferfleet.results.scripts import Script
from inferfleet.results.servers import Call
from inferfleet.wire.stored import result_key


class Standing:
    """Servers on which all keys stand but those of ``gone``; remembers what it was asked."""

    def __init__(self, *gone: str, joins_keys: bool = True) -> None:
        self.joins_keys = joins_keys
        self.gone = {result_key("f", "digits", name) for name in gone}
        self.asked: list[str] = []
        self.fails = False

    def run(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        if self.fails:
            return [ConnectionError("away") for _ in calls]
        assert self.joins_keys or all(len(call.keys) == 1 for call in calls)
        self.asked += [key for call in calls for key in call.keys]
        return [[at for at, key in enumerate(call.keys, 1) if key in self.gone] for call in calls]

    def renew(self) -> None: ...
    def disconnect(self) -> None: ...
    def close(self) -> None: ...


@pytest.mark.parametrize("joins_keys", [True, False])
def test_what_is_gone_is_named(joins_keys: bool) -> None:
    """Route and id of each result that does not stand, however many calls it takes to ask."""
    recall = Recall("f", 10_000, 60)
    recall.note("digits", [f"a-{n}" for n in range(500)], 3600, 10)
    recall.note("files", ["a-7"], 3600, 11)
    servers = Standing("a-7", "a-450", joins_keys=joins_keys)
    lost = recall.look_back(servers, 12)
    assert lost.rows == [("digits", "a-7"), ("digits", "a-450")]
    assert (lost.checked, lost.by_route) == (501, {"digits": 2})
    assert recall.look_back(servers, 13).checked == 0


def test_only_the_newest_are_remembered() -> None:
    """Older ones make room, by count and by age, but an outage makes nothing older than it is."""
    recall = Recall("f", 100, 60)
    for at in range(20):
        recall.note("digits", [f"{at}-{n}" for n in range(10)], 3600, at * 10)
    lost = recall.look_back(Standing(), 1000)
    assert lost.checked == 70
    recall.note("digits", [f"x-{n}" for n in range(60)], 3600, 0)
    recall.note("digits", [f"y-{n}" for n in range(60)], 3600, 1)
    assert recall.look_back(Standing(), 500).checked == 60
    recall.note("digits", [f"z-{n}" for n in range(500)], 3600, 1)
    assert recall.look_back(Standing(), 500).checked == 500


def test_what_expires_about_now_may_be_gone() -> None:
    """A result at the end of its life is not asked for: nobody lost it."""
    recall = Recall("f", 100, 60)
    recall.note("digits", ["short"], 5, 0)
    recall.note("digits", ["long"], 50, 0)
    servers = Standing("short")
    assert recall.look_back(servers, 4.5).rows == []
    assert servers.asked == [result_key("f", "digits", "long")]


def test_a_look_that_fails_is_taken_again() -> None:
    """Nothing is forgotten before it was found or missed."""
    recall = Recall("f", 100, 60)
    recall.note("digits", ["a"], 3600, 0)
    servers = Standing("a")
    servers.fails = True
    with pytest.raises(ConnectionError):
        recall.look_back(servers, 1)
    servers.fails = False
    assert recall.look_back(servers, 2).rows == [("digits", "a")]
