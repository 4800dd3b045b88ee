"""How a start waits: bounded, each reason told once, and not at all where nobody asked for it."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from inferfleet.cli import starting
from inferfleet.config import Config, Routes
from inferfleet.errors import BrokerError, ModelRepositoryError
from inferfleet.patience import SERVER_S, Patience


class Missing:
    """Something that stands after so many looks; each reason why it does not yet, is given twice."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.seen = 0

    def __call__(self) -> str:
        self.seen += 1
        if self.seen <= self.looks:
            raise BrokerError(f"topic {self.seen // 2} does not exist")
        return "there"


def test_without_wait_nothing_is_waited_for_but_servers() -> None:
    """The first error is the last one, and a server has its usual time."""
    missing, patience = Missing(1), Patience()

    with pytest.raises(BrokerError, match="topic 0"):
        patience.until("waiting_for_topics", missing)

    assert (missing.seen, patience.server_s, patience.given) == (1, SERVER_S, False)


def test_with_wait_it_is_looked_for_until_it_is_there_and_each_reason_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three looks fail for two reasons: two lines, then the answer."""
    monkeypatch.setattr("inferfleet.patience._AGAIN_S", 0.001)
    missing = Missing(3)

    with capture_logs() as lines:
        assert Patience(60).until("waiting_for_topics", missing) == "there"

    assert [(line["event"], line["error"]) for line in lines] == [
        ("waiting_for_topics", "topic 0 does not exist"),
        ("waiting_for_topics", "topic 1 does not exist"),
    ]
    assert missing.seen == 4


def test_when_the_time_is_over_the_last_reason_is_raised() -> None:
    """It is bounded by the time that was given in all; a server that is there has a second to say so."""
    patience = Patience(0)

    with pytest.raises(BrokerError, match="topic 0"):
        patience.until("waiting_for_topics", Missing(1_000))

    assert patience.server_s == 1


def test_a_version_that_is_missing_holds_up_no_fleet_that_has_other_routes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A route of the control plane waits for its versions by itself; those of a file go together."""

    def missing(*_: object) -> None:
        raise ModelRepositoryError("model 'sums' has no version 9")

    monkeypatch.setattr(starting, "look_for_models", missing)
    starting.wait_for_all(Config(routes=Routes(source="fleet")), (), Patience(0.01))
    with pytest.raises(ModelRepositoryError, match="version 9"):
        starting.wait_for_all(Config(), (), Patience(0.01))
