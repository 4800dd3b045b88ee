"""Which value answers which request, and who hears of it: the rules without servers."""

from __future__ import annotations

import pytest

from inferfleet.client.inbox import Inbox
from inferfleet.client.outcome import ClientError, DuplicateIdError, Outcome, Result
from inferfleet.wire.stored import mark, payload_hash

MINE, OTHER = payload_hash(b"mine"), payload_hash(b"other")
OK, ERROR = b'{"model_name":"m","outputs":[]}', b'{"error":"no","code":"E_MODEL"}'


def expecting(inbox: Inbox, request_id: str = "a") -> list[Outcome]:
    came: list[Outcome] = []
    inbox.expect(request_id, "digits", MINE, came.append)
    return came


def test_a_reply_reaches_who_waits_and_a_repeated_one_nobody() -> None:
    """The outbox repeats after a doubtful write; the second copy is dropped."""
    inbox = Inbox()
    came = expecting(inbox)
    inbox.replied("a", mark(OK, MINE))
    inbox.replied("a", mark(OK, MINE))
    inbox.replied("unknown", OK)
    assert came == [Result("a", "digits", mark(OK, MINE))]
    assert len(inbox) == 0


def test_a_reply_for_another_payload_is_not_taken() -> None:
    """The stream may carry the outcome of an earlier request under the same id."""
    inbox = Inbox()
    came = expecting(inbox)
    inbox.replied("a", mark(OK, OTHER))
    assert came == []
    inbox.replied("a", mark(ERROR, MINE))
    assert [isinstance(each, Result) and each.code for each in came] == ["E_MODEL"]


def test_an_answer_that_stands_counts_only_for_its_own_payload() -> None:
    """A foreign answer is ignored while time is left, and is E_DUP_ID when it ends."""
    inbox = Inbox()
    came = expecting(inbox)
    inbox.stands("a", mark(OK, OTHER))
    assert came == []
    inbox.stands("a", mark(OK, OTHER), last=True)
    (result,) = came
    assert isinstance(result, Result)
    assert result.code == "E_DUP_ID"


def test_an_error_that_stands_counts_only_when_time_is_up() -> None:
    """It may be left from an attempt before this one."""
    inbox = Inbox()
    came = expecting(inbox)
    inbox.stands("a", mark(ERROR, MINE))
    assert came == []
    inbox.stands("a", mark(ERROR, MINE), last=True)
    assert [isinstance(each, Result) and each.code for each in came] == ["E_MODEL"]


def test_a_foreign_error_that_stands_is_nobodys_outcome() -> None:
    """Neither now nor at the end: the request itself may still be answered."""
    inbox = Inbox()
    came = expecting(inbox)
    inbox.stands("a", mark(ERROR, OTHER), last=True)
    assert came == []
    assert len(inbox) == 1


def test_an_outcome_nobody_asked_for_yet_is_kept() -> None:
    """``result`` after the answer came is answered at once, once."""
    inbox = Inbox()
    inbox.expect("a", "digits", MINE)
    inbox.replied("a", OK)
    came: list[Outcome] = []
    assert inbox.claim("a", came.append)
    assert came == [Result("a", "digits", OK)]
    assert not inbox.claim("a", came.append)


def test_unclaimed_outcomes_are_bounded() -> None:
    """The oldest are let go: they still stand in Redis."""
    inbox = Inbox(max_unclaimed=2)
    for request_id in "abc":
        inbox.expect(request_id, "digits", MINE)
        inbox.replied(request_id, OK)
    came: list[Outcome] = []
    assert [inbox.claim(request_id, came.append) for request_id in "abc"] == [False, True, True]


def test_two_payloads_under_one_id_cannot_be_awaited() -> None:
    """The same payload may be submitted again; another one is refused."""
    inbox = Inbox()
    first, second = expecting(inbox), expecting(inbox)
    with pytest.raises(DuplicateIdError):
        inbox.expect("a", "digits", OTHER)
    inbox.replied("a", OK)
    assert first == second == [Result("a", "digits", OK)]


def test_a_claim_taken_back_leaves_the_outcome_for_the_next() -> None:
    """A wait that timed out does not swallow the answer."""
    inbox = Inbox()
    inbox.expect("a", "digits", MINE)
    late: list[Outcome] = []
    inbox.claim("a", late.append)
    inbox.leave("a", late.append)
    inbox.replied("a", OK)
    again: list[Outcome] = []
    assert inbox.claim("a", again.append)
    assert (late, len(again)) == ([], 1)


def test_the_end_answers_every_wait() -> None:
    """Nobody waits for a closed client."""
    inbox = Inbox()
    came = expecting(inbox)
    inbox.end(lambda request_id: ClientError(f"{request_id} closed"))
    assert [str(each) for each in came] == ["a closed"]
