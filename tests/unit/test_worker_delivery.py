"""Delivery: one outcome for each request on each outlet, settled when the last of them is confirmed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from inferfleet.errors import RULES, Code
from inferfleet.ports import RefusalKind
from inferfleet.records import (
    AnswerForm,
    Failures,
    RowFailure,
    Signature,
    TensorSpec,
)
from inferfleet.wire.stored import payload_hash, payload_of
from tests.support.builders import chunk
from tests.support.traces import TRACE
from tests.unit.delivered import BOTH, DLT, SIGNATURE, Bench, code_of, counted

# Settling


def test_records_settle_when_every_outlet_has_confirmed_and_not_before() -> None:
    """Two topics and Redis: the last of the three receipts settles."""
    bench = Bench(("kafka:out", "kafka:copy", "redis"))
    bench.answer(bench.part())
    bench.outlet.confirm_some("out")
    bench.store.poll()
    assert bench.rows == []
    bench.outlet.confirm_some("copy")
    assert bench.rows == [0, 1, 2]
    assert bench.outcomes == {"ok": 3}


@pytest.mark.parametrize("at_once", [False, True])
def test_outlets_that_confirm_inside_publish_settle_exactly_once(at_once: bool) -> None:
    """The hand-over itself counts, so that the first outlet does not settle for the second."""
    bench = Bench(BOTH, at_once=at_once)
    bench.answer(bench.part())
    assert bench.rows == []
    bench.finish()
    assert bench.rows == [0, 1, 2]


def test_a_store_that_is_away_keeps_its_records_open() -> None:
    """No error, no dead letter: the outlet holds them until it is back."""
    bench = Bench(BOTH)
    bench.store.go_away()
    bench.answer(bench.part())
    bench.finish()
    assert bench.rows == []
    bench.store.come_back()
    bench.finish()
    assert bench.rows == [0, 1, 2]
    assert bench.outlet.to(DLT) == []


def test_an_answer_carries_key_body_and_headers() -> None:
    """The key is the request's, the id is in body and header, the trace goes on."""
    bench = Bench(BOTH)
    bench.answer(bench.part(1, traces=[TRACE]), [[0.5, 1.5]])
    bench.finish()
    (sent,) = bench.outlet.to("out")
    assert sent.key == b"key-0"
    assert json.loads(sent.value or b"") == {
        "model_name": "m",
        "model_version": "1",
        "id": "id-100",
        "outputs": [{"name": "y", "shape": [1, 2], "datatype": "FP32", "data": [0.5, 1.5]}],
    }
    served = b"route=digits;model=m;version=1;variant=stable;revision=17;worker=w-3"
    assert sent.headers == [
        ("inferfleet-id", b"id-100"),
        ("inferfleet-status", b"ok"),
        ("inferfleet-served", served),
        ("traceparent", TRACE),
    ]
    stored = bench.store.results["digits", "id-100"]
    assert stored.ttl_s == 3600
    assert payload_of(stored.body) == payload_hash(b"body-0")


def test_a_binary_answer_is_binary_on_topics_and_json_in_the_store() -> None:
    """Redis always holds JSON."""
    bench = Bench(BOTH)
    bench.answer(bench.part(1, form=AnswerForm(binary=True)), np.array([[1, 2]], np.float32))
    bench.finish()
    (sent,) = bench.outlet.to("out")
    length = int(sent.header("inference-header-content-length") or b"")
    assert (sent.value or b"")[length:] == np.array([1, 2], "<f4").tobytes()
    assert json.loads(bench.store.results["digits", "id-100"].body)["outputs"][0]["data"] == [1.0, 2.0]


def test_a_reply_alone_stores_nothing() -> None:
    """A route without Redis answers clients that named a stream, and nobody else there."""
    bench = Bench()
    bench.answer(bench.part(2, replies=[None, "me"]))
    bench.finish()
    assert bench.store.results == {}
    assert [entry.id for entry in bench.store.replies["me"]] == ["id-101"]
    assert bench.rows == [0, 1]


# Answers that may not be given


@pytest.mark.parametrize(
    ("datatype", "nan"), [("FP32", np.nan), ("FP32", np.inf), ("FP16", -np.inf), ("BF16", 0x7FC0)]
)
def test_an_output_that_is_not_finite_fails_its_request_alone(datatype: str, nan: float) -> None:
    """Of requests with several rows one bad row fails the request; neighbours are answered."""
    signature = Signature(SIGNATURE.inputs, (TensorSpec("y", datatype, (2,)),))
    bench = Bench(BOTH, signature=signature)
    kind = np.uint16 if datatype == "BF16" else np.float16 if datatype == "FP16" else np.float32
    outputs = np.zeros((6, 2), kind)
    outputs[2, 1] = nan
    bench.answer(bench.part(3, counts=[2, 2, 2]), outputs)
    bench.finish()
    assert sorted(map(str, bench.codes())) == ["E_MODEL_OUTPUT", "None", "None"]
    assert [code_of(letter) for letter in bench.outlet.to(DLT)] == ["E_MODEL_OUTPUT"]
    assert bench.outlet.to(DLT)[0].key == b"key-1"
    assert bench.rows == [0, 1, 2]
    assert bench.outcomes == {"ok": 2, "E_MODEL_OUTPUT": 1}


def test_a_route_may_allow_nan() -> None:
    """JSON shows it as null."""
    bench = Bench(route={"nan": "allow"})
    bench.answer(bench.part(1), np.array([[np.nan, 1]], np.float32))
    bench.finish()
    assert b'"data":[null,1.0]' in (bench.outlet.to("out")[0].value or b"")


def test_a_deadline_that_passed_while_the_model_ran_is_e_deadline() -> None:
    """No success is delivered late, and lateness is no dead letter."""
    bench = Bench(BOTH)
    now_ms = bench.clock.utc_ms()
    bench.answer(bench.part(3, deadlines_ms=[now_ms, None, now_ms + 1]))
    bench.finish()
    assert sorted(map(str, bench.codes())) == ["E_DEADLINE", "None", "None"]
    assert bench.outlet.to(DLT) == []
    assert bench.rows == [0, 1, 2]


def test_expired_requests_get_e_deadline_and_a_dead_letter_where_asked() -> None:
    """``[dlt] include`` adds codes to the table's."""
    bench = Bench(dead_letter_also=frozenset({"E_DEADLINE"}))
    bench.delivery.expired(bench.plan, bench.part(2))
    bench.finish()
    assert bench.codes() == bench.codes(DLT) == ["E_DEADLINE", "E_DEADLINE"]
    assert bench.rows == [0, 1]


def test_an_answer_over_our_own_limit_becomes_an_error() -> None:
    """Its neighbours are answered."""
    bench = Bench(BOTH, max_result_bytes=200)
    part = bench.part(3)
    part.ids[1] = "i" * 120
    bench.answer(part)
    bench.finish()
    assert sorted(map(str, bench.codes())) == ["E_RESULT_TOO_LARGE", "None", "None"]
    assert bench.codes(DLT) == ["E_RESULT_TOO_LARGE"]
    assert bench.rows == [0, 1, 2]
    assert bench.outcomes == {"ok": 2, "E_RESULT_TOO_LARGE": 1}


# Errors


@pytest.mark.parametrize("code", list(Code))
def test_every_failed_request_has_one_error_a_topic_and_a_dead_letter_by_the_table(code: Code) -> None:
    """The original record is untouched in the dead letter; ours stands behind it."""
    bench = Bench(("kafka:out", "kafka:copy", "redis"))
    of = chunk([b"\xffraw", None], [[("own", b"1"), ("inferfleet-code", b"forged")], None], keys=[None, b"k"])
    failures = Failures(of, [0, 1], ["a", None], [code] * 2, ["why", "no"], [None, "me"], [TRACE, None])
    bench.delivery.fail(bench.plan, failures)
    bench.finish()
    for topic in ("out", "copy"):
        first, second = bench.outlet.to(topic)
        assert json.loads(first.value or b"") == {
            "error": "why",
            "code": code.value,
            "id": "a",
            "retryable": RULES[code].retryable,
        }
        assert first.header("inferfleet-status") == b"error"
        assert first.header("traceparent") == TRACE
        assert second.header("inferfleet-id") == b"digits.requests-3-101"
        assert (first.key, second.key) == (None, b"k")
    assert set(bench.store.results) == {("digits", "a"), ("digits", "digits.requests-3-101")}
    assert [entry.status for entry in bench.store.replies["me"]] == ["error"]
    letters = bench.outlet.to(DLT)
    assert len(letters) == (2 if RULES[code].dead_letter else 0)
    if letters:
        assert [(letter.key, letter.value) for letter in letters] == [(None, b"\xffraw"), (b"k", None)]
        assert letters[0].headers[:2] == [("own", b"1"), ("inferfleet-code", b"forged")]
        assert {name: letters[0].header(f"inferfleet-{name}") for name in _LETTER} == {
            "origin-topic": b"digits.requests",
            "origin-partition": b"3",
            "origin-offset": b"100",
            "origin-timestamp": b"1700000000000",
            "code": code.value.encode(),
            "error": b"why",
            "attempt": b"1",
            "failed-at": b"1790000000000",
            "served": b"route=digits;model=m;version=;variant=;revision=17;worker=w-3",
        }
    assert bench.rows == [0, 1]
    registry = bench.metrics.registry
    labels = {"route": "digits", "code": code.value}
    assert counted(registry, "inferfleet_dead_letters_total", **labels) == len(letters)


_LETTER = (
    "origin-topic",
    "origin-partition",
    "origin-offset",
    "origin-timestamp",
    "code",
    "error",
    "attempt",
    "failed-at",
    "served",
)


def test_a_dead_letters_text_is_bounded_and_cut_between_characters() -> None:
    """At most 1 KiB of UTF-8, always readable."""
    bench = Bench()
    failures = Failures(chunk([b"x"]), [0], ["a"], [Code.DECODE], ["x" + "é" * 1_000], [None], [None])
    bench.delivery.fail(bench.plan, failures)
    bench.finish()
    text = bench.outlet.to(DLT)[0].header("inferfleet-error") or b""
    assert text.decode() == "x" + "é" * 511


def test_a_model_failure_names_the_version_that_failed_it() -> None:
    """One error and one dead letter a row, each with what served it."""
    bench = Bench()
    part = bench.part(2)
    bench.delivery.row_failures(
        bench.plan, [RowFailure(part.slice(i, i + 1), Code.MODEL, "no") for i in range(2)]
    )
    bench.finish()
    assert bench.codes() == bench.codes(DLT) == ["E_MODEL", "E_MODEL"]
    for each in (*bench.outlet.to("out"), *bench.outlet.to(DLT)):
        assert b"version=1;variant=stable" in (each.header("inferfleet-served") or b"")


# A stream that was taken away


def test_a_dead_chunk_publishes_nothing() -> None:
    """Whatever still finishes for an old epoch is dropped at hand-over."""
    bench = Bench(BOTH)
    part = bench.part()
    part.chunk.live = False
    bench.answer(part)
    bench.delivery.expired(bench.plan, part)
    bench.delivery.fail(bench.plan, Failures(part.chunk, [0], ["a"], [Code.DECODE], ["no"], [None], [None]))
    assert bench.outlet.sent == []
    assert bench.store.pending() == 0


@pytest.mark.parametrize("kind", list(RefusalKind))
def test_a_refusal_after_the_end_of_an_epoch_leads_to_nothing(kind: RefusalKind) -> None:
    """No error, no dead letter, and no route is held for a stream that is gone."""
    bench = Bench()
    part = bench.part()
    bench.outlet.refusing["out"] = kind
    bench.answer(part)
    part.chunk.live = False
    bench.finish()
    assert len(bench.outlet.sent) == 3
    assert bench.delivery.held() == {}
