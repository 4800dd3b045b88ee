"""Labels and outcomes are read from topics that anybody may write to."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.feedback import FIRST, Answered, Label, Sought
from inferfleet.routes import Destination
from inferfleet.wire.feedback import AnswerReader, classes_of, read_label

SOUGHT = Sought(
    Destination("kafka", "labels"), Destination("kafka", "r"), "digits", frozenset({"1", "2"}), 7, 0, "p"
)
ANSWER = msgspec.json.encode(
    {
        "model_name": "digits",
        "model_version": "2",
        "id": "a",
        "outputs": [{"name": "p", "shape": [2, 3], "datatype": "FP32", "data": [0.1, 0.7, 0.2, 0.9, 0, 0]}],
    }
)


def headers(
    request_id: str = "a", served: str = "route=digits;model=digits;version=2;variant=canary;revision=7"
) -> list[tuple[str, bytes | None]]:
    return [("inferfleet-id", request_id.encode()), ("inferfleet-served", served.encode())]


def test_a_label_has_an_id_and_named_numbers() -> None:
    """The header's id goes before the body's; true and false are numbers, text is none."""
    body = b'{"id": "a", "clicks": 2, "bought": true, "colour": "red", "label": 3}'

    assert read_label(body, None, 5) == Label("a", 5, {"clicks": 2.0, "bought": 1.0}, (3,))
    assert read_label(b'{"id": "b", "x": 1}', [("Inferfleet-Id", b"h")], 5) == Label("h", 5, {"x": 1.0})
    assert read_label(b'{"id": "a", "label": [3, 4]}', None, 5) == Label("a", 5, {}, (3, 4))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[1]",
        b"{}",
        b'{"clicks": 1}',
        b'{"id": "a"}',
        b'{"id": 7, "x": 1}',
        b'{"id": "a", "x": "1"}',
        b'{"id": "a", "label": 1.5}',
        b'{"id": "a", "label": []}',
        b'{"id": "a", "x": 1e999}',
        b'{"id": "a", "x": 1e101}',
        b'{"id": "a", "x": 1%b}' % (b"0" * 400),
        b'{"id": "a", "label": 1%b}' % (b"0" * 400),
        b'{"id": "a", "label": 1e300}',
        b'{"id": "%b", "x": 1}' % (b"a" * 129),
        b"\xff",
        b"[" * 10_000,
    ],
)
def test_what_is_no_label_is_none(body: bytes) -> None:
    """Whoever may write labels cannot stop a rollout."""
    assert read_label(body, None, 0) is None


@pytest.mark.parametrize("served", ["", "revision=" + "7" * 5_000, "revision=\u0667", "=;;=", ";" * 1_000])
def test_an_outcome_that_says_nonsense_of_itself_counts_for_nobody(served: str) -> None:
    """Nor does it stop whoever reads it."""
    reader = AnswerReader(SOUGHT)

    assert reader.read(None, headers(served=f"route=digits;version=2;{served}"), ANSWER, 1) in (
        None,
        Answered("a", "2", "", b"a", 1, (1, 0)),
    )
    assert reader.read(None, headers("a" * 129), ANSWER, 1) is None


@given(st.binary(max_size=200))
def test_no_bytes_raise(body: bytes) -> None:
    """Whatever stands in a topic is read or left."""
    read_label(body, None, 0)
    classes_of(body, "p")


def test_an_answer_says_who_gave_it() -> None:
    """The version stands in the header that every outcome carries, the key is the unit."""
    reader = AnswerReader(SOUGHT)

    assert reader.read(b"k", headers(), ANSWER, 9) == Answered("a", "2", "canary", b"k", 9, (1, 0))
    assert reader.read(None, headers(), b"broken", 9) == Answered("a", "2", "canary", b"a", 9, None)


def test_an_error_outcome_has_no_class() -> None:
    """It was answered by its version all the same."""
    found = AnswerReader(SOUGHT).read(b"k", [*headers(), ("inferfleet-status", b"error")], b"{}", 9)

    assert found == Answered("a", "2", "canary", b"k", 9, ())


@pytest.mark.parametrize(
    "served",
    [
        "route=other;version=2;variant=canary;revision=7",
        "route=digits;version=3;variant=canary;revision=7",
        "route=digits;version=2;variant=canary;revision=6",
        "route=digits;version=2;variant=canary;revision=7;fallback=1",
        "route=digits;version=2;variant=canary;revision=abc",
        "nonsense",
        "",
    ],
)
def test_answers_that_are_not_the_rollouts_are_left(served: str) -> None:
    """Other routes, other versions, earlier revisions, and what stable answered in another's place."""
    assert AnswerReader(SOUGHT).read(b"k", headers(served=served), ANSWER, 9) is None


def test_classes_are_cut_by_rows() -> None:
    """One number a row is the class itself; what does not divide into rows is not guessed."""
    one = {"outputs": [{"name": "p", "shape": [3], "data": [4, 0, 9]}]}
    odd = {"outputs": [{"name": "p", "shape": [2, 3], "data": [1, 2, 3]}]}
    text = {"outputs": [{"name": "p", "shape": [1, 2], "data": ["a", "b"]}]}

    assert classes_of(msgspec.json.encode(one), "p") == (4, 0, 9)
    assert classes_of(msgspec.json.encode(odd), "p") is None
    assert classes_of(msgspec.json.encode(text), "p") is None
    assert classes_of(ANSWER, "other") is None
    assert classes_of(ANSWER, FIRST) == (1, 0)
