"""What a destination or the store refuses: held and tried again, cut, answered otherwise, never lost."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from inferfleet.errors import Code
from inferfleet.ports import RefusalKind
from inferfleet.records import (
    Answer,
    Failures,
)
from inferfleet.wire.encode import AnswerWriter
from inferfleet.wire.stored import payload_hash, payload_of
from tests.support.builders import chunk
from tests.support.traces import TRACE
from tests.unit.delivered import BOTH, DLT, Bench


@pytest.mark.parametrize("kind", [RefusalKind.LATER, RefusalKind.DENIED])
@pytest.mark.parametrize("at_once", [False, True])
def test_what_is_refused_for_now_is_held_tried_again_and_settled_once(
    kind: RefusalKind, at_once: bool
) -> None:
    """The route says why it is held; pauses grow; nothing is lost or doubled."""
    bench = Bench(("kafka:out", "kafka:copy"), at_once=at_once)
    bench.outlet.refusing["out"] = kind
    bench.answer(bench.part())
    bench.finish()
    assert bench.rows == []
    assert bench.delivery.held() == {"digits": "out refuses: told to refuse"}
    tries = 0
    for _ in range(60):
        before = len(bench.outlet.sent)
        bench.delivery.retry_parked(bench.clock.monotonic())
        bench.finish()
        tries += len(bench.outlet.sent) > before
        assert list(bench.delivery.held()) == ["digits"]
        bench.clock.advance(1)
    assert 4 <= tries <= 8, "pauses of 1, 2, 4, 8, then 15 seconds"
    del bench.outlet.refusing["out"]
    bench.clock.advance(15)
    bench.delivery.retry_parked(bench.clock.monotonic())
    bench.finish()
    assert bench.delivery.held() == {}
    assert bench.rows == [0, 1, 2]
    assert [each.header("inferfleet-id") for each in bench.outlet.to("out")] == [
        b"id-100",
        b"id-101",
        b"id-102",
    ]
    assert len(bench.outlet.to("copy")) == 3


def test_a_drain_tries_at_once() -> None:
    """``force`` does not wait for the pause to end."""
    bench = Bench()
    bench.outlet.refusing["out"] = RefusalKind.LATER
    bench.answer(bench.part(1))
    bench.finish()
    bench.outlet.refusing.clear()
    bench.delivery.retry_parked(bench.clock.monotonic())
    assert bench.outlet.pending() == 0
    bench.delivery.retry_parked(bench.clock.monotonic(), force=True)
    bench.finish()
    assert bench.rows == [0]


def test_parked_envelopes_of_a_dead_chunk_are_dropped() -> None:
    """The next owner of the stream answers them; this route goes on."""
    bench = Bench()
    bench.outlet.refusing["out"] = RefusalKind.LATER
    dead, live = bench.part(1), bench.part(1, of=chunk([b"b"], first=200))
    bench.answer(dead)
    bench.answer(live)
    bench.finish()
    dead.chunk.live = False
    bench.outlet.refusing.clear()
    bench.delivery.retry_parked(bench.clock.monotonic(), force=True)
    bench.finish()
    assert [each.header("inferfleet-id") for each in bench.outlet.to("out")] == [b"id-200"]
    assert bench.delivery.held() == {}
    assert [settling.chunk for settling in bench.settled] == [live.chunk]


def test_a_dead_letter_that_is_refused_keeps_its_record_open() -> None:
    """A record is never skipped because its dead letter could not be written."""
    bench = Bench()
    bench.outlet.refusing[DLT] = RefusalKind.TOO_LARGE
    of = chunk([b"x"], [[("inferfleet-status", b"ok")]])
    bench.delivery.fail(bench.plan, Failures(of, [0], ["a"], [Code.DECODE], ["no"], [None], [None]))
    bench.finish()
    assert bench.codes() == ["E_DECODE"]
    assert bench.rows == []
    assert list(bench.delivery.held()) == ["digits"]


def test_an_answer_that_is_too_large_for_its_topic_becomes_an_error_there() -> None:
    """One error on each topic that refused, one dead letter in all, and the trace goes on."""
    bench = Bench(("kafka:out", "kafka:copy", "kafka:large"))
    outlet = bench.outlet
    bench.answer(bench.part(1, traces=[TRACE]))
    outlet.refusing = {"out": RefusalKind.TOO_LARGE, "copy": RefusalKind.TOO_LARGE}
    outlet.confirm_some()
    assert bench.rows == []
    outlet.refusing = {}
    bench.finish()
    assert bench.codes("out") == bench.codes("copy") == ["E_RESULT_TOO_LARGE"]
    assert bench.codes("large") == [None]
    assert bench.codes(DLT) == ["E_RESULT_TOO_LARGE"]
    error = outlet.to("out")[0]
    assert json.loads(error.value or b"")["id"] == "id-100"
    assert error.header("traceparent") == TRACE
    assert bench.rows == [0]
    assert bench.outcomes == {"E_RESULT_TOO_LARGE": 1}


def test_an_error_that_is_too_large_is_parked_and_not_answered_with_another() -> None:
    """A key over the topic's limit would else make errors for ever."""
    bench = Bench()
    bench.outlet.refusing["out"] = RefusalKind.TOO_LARGE
    bench.answer(bench.part(1))
    bench.finish()
    assert len([each for each in bench.outlet.sent if each.destination == "out"]) == 2
    assert bench.codes(DLT) == ["E_RESULT_TOO_LARGE"]
    assert list(bench.delivery.held()) == ["digits"]
    assert bench.rows == []


# The same id with another payload


def _reuse(bench: Bench, first: list[str | None], second: list[str | None]) -> None:
    """Answer ids 100 and 101, then the same ids with other payloads."""
    bench.answer(bench.part(2, replies=first))
    bench.finish()
    bench.answer(bench.part(2, of=chunk([b"other", b"other"]), replies=second))
    bench.finish()


def test_a_reused_id_never_gets_anothers_answer_from_the_store() -> None:
    """``E_DUP_ID`` to its client and the dead letters; the answer that stands is untouched."""
    bench = Bench(BOTH)
    _reuse(bench, [None, "me"], ["you", None])
    assert payload_of(bench.store.results["digits", "id-100"].body) == payload_hash(b"body-0")
    (reply,) = bench.store.replies["you"]
    assert json.loads(reply.body)["code"] == "E_DUP_ID"
    assert bench.codes(DLT) == ["E_DUP_ID", "E_DUP_ID"]
    assert [letter.value for letter in bench.outlet.to(DLT)] == [b"other", b"other"]
    assert bench.rows == [0, 0, 1, 1]
    assert bench.outcomes == {"ok": 2, "E_DUP_ID": 2}


def test_the_same_request_again_is_answered_with_what_stands() -> None:
    """A redelivery changes nothing and harms nobody."""
    bench = Bench(BOTH)
    for _ in range(2):
        bench.answer(bench.part(1, replies=["me"]))
        bench.finish()
    first, again = bench.store.replies["me"]
    assert first == again
    assert bench.outlet.to(DLT) == []


def test_a_failed_request_with_a_reused_id_has_one_error_and_one_dead_letter() -> None:
    """Its own error reaches its client; the store keeps the other's answer."""
    bench = Bench(BOTH)
    bench.answer(bench.part(1))
    bench.finish()
    of = chunk([b"other"])
    bench.delivery.fail(bench.plan, Failures(of, [0], ["id-100"], [Code.SHAPE], ["no"], ["me"], [None]))
    bench.finish()
    assert bench.codes(DLT) == ["E_SHAPE"]
    assert bench.codes() == [None, "E_SHAPE"]
    assert [json.loads(reply.body)["code"] for reply in bench.store.replies["me"]] == ["E_SHAPE"]
    assert b"outputs" in bench.store.results["digits", "id-100"].body
    assert bench.rows == [0, 0]


def test_an_answer_that_cannot_be_written_is_kept_from_its_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A writer that breaks on one answer gives that one E_INTERNAL and a dead letter."""
    whole = AnswerWriter.json_bodies

    def breaks(self: AnswerWriter, answer: Answer, outputs: Sequence[str] | None = None) -> list[bytes]:
        if 1 in answer.part.rows:
            raise ZeroDivisionError
        return whole(self, answer, outputs)

    monkeypatch.setattr(AnswerWriter, "json_bodies", breaks)
    bench = Bench()
    bench.answer(bench.part())
    bench.finish()

    assert bench.rows == [0, 1, 2]
    assert bench.outcomes == {"ok": 2, "E_INTERNAL": 1}
    assert len(bench.outlet.to(DLT)) == 1
