"""The committed schemas: equal to what the types say, met by every example and by what really is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from inferfleet.core.routing import BUCKETS, Steering
from inferfleet.datatypes import DATATYPES
from inferfleet.errors import Code
from inferfleet.records import Answer, AnswerForm, Failures, Signature, TensorSpec
from inferfleet.testing.clock import FakeClock
from inferfleet.wire.encode import AnswerWriter, error_body, error_headers, ok_headers, served_header
from inferfleet.wire.messages import (
    DEAD_LETTER_HEADERS,
    OUTCOME_HEADERS,
    REQUEST_HEADERS,
    RETRY_HEADERS,
    ErrorOutcome,
    HeaderRule,
    InferenceResponse,
)
from inferfleet.wire.stored import mark, payload_hash
from inferfleet.worker.deadletter import dead_letter_headers
from inferfleet.worker.plan import RoutePlan
from inferfleet.worker.retries import OURS, retry_headers
from scripts.schema_files import FOLDER, files
from tests.support.builders import binary_headers, chunk, codes, decoder, requests, signature
from tests.support.outlets import route_plan

BODIES = ("request", "columns", "response", "error")
EXAMPLES = sorted((FOLDER / "examples").glob("*.json"))
IMAGE = TensorSpec("image", "FP32", (4,))
OUTPUTS = (TensorSpec("probabilities", "FP32", (2,)), TensorSpec("label", "BYTES", ()))


def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((FOLDER / f"{name}.v1.json").read_text(encoding="utf-8")))


VALIDATORS = {name: _validator(name) for name in BODIES}


def test_the_committed_files_are_what_the_generator_writes() -> None:
    """Types and schemas cannot drift apart; ``./scripts/schemas`` mends a failure here."""
    found = {str(p.relative_to(FOLDER)): p.read_text(encoding="utf-8") for p in FOLDER.rglob("*.json")}
    assert found == files()


@pytest.mark.parametrize("name", BODIES)
def test_every_schema_is_one(name: str) -> None:
    """In the dialect that it names."""
    Draft202012Validator.check_schema(VALIDATORS[name].schema)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_meets_its_schema_and_is_read(path: Path) -> None:
    """Requests by the decoder, outcomes by their types."""
    text = path.read_bytes()
    kind = path.stem.partition("-")[0]
    VALIDATORS[kind].validate(json.loads(text))
    if kind == "response":
        msgspec.json.decode(text, type=InferenceResponse)
    elif kind == "error":
        msgspec.json.decode(text, type=ErrorOutcome)
    else:
        reader = decoder(signature(IMAGE, outputs=OUTPUTS), columns=kind == "columns")
        is_binary = "binary" in path.stem
        body = text + np.zeros(4, np.float32).tobytes() if is_binary else text
        assert codes(reader.decode(chunk([body], [binary_headers(len(text)) if is_binary else None]))) == {}


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("request", {}),
        ("request", {"inputs": []}),
        ("request", {"id": "a b", "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}),
        ("request", {"inputs": [{"name": "x", "shape": [1], "datatype": "FLOAT", "data": [1]}]}),
        ("request", {"inputs": [{"name": "x", "shape": [0], "datatype": "FP32", "data": []}]}),
        ("request", {"inputs": [{"name": "x", "shape": [2**31], "datatype": "FP32", "data": []}]}),
        ("request", {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32"}]}),
        ("request", {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1],
                                 "parameters": {"binary_data_size": 4}}]}),
        ("columns", {}),
        ("columns", {"image": None}),
        ("error", {"error": "no", "code": "E_SHAPE", "id": "a", "retryable": True}),
        ("error", {"error": "no", "code": "E_OTHER", "id": "a", "retryable": False}),
        ("error", {"error": "no", "code": "E_SHAPE", "id": None, "retryable": False}),
        ("response", {"model_name": "m", "model_version": "01", "id": "a", "outputs": []}),
        ("response", {"model_name": "m", "model_version": "1", "outputs": []}),
    ],
)  # fmt: skip
def test_what_the_decoder_refuses_the_schema_refuses_too(name: str, document: Any) -> None:
    """A schema that lets everything pass would prove nothing."""
    assert not VALIDATORS[name].is_valid(document)


@given(data=st.data(), rows=st.integers(1, 3), form=st.sampled_from([AnswerForm(), AnswerForm(True)]))
def test_what_the_encoder_writes_meets_the_schema_and_the_type(
    data: st.DataObject, rows: int, form: AnswerForm
) -> None:
    """Every datatype, several outputs, with and without the store's mark."""
    chosen = data.draw(st.lists(st.sampled_from(list(DATATYPES)), min_size=1, max_size=3, unique=True))
    specs = tuple(TensorSpec(name.lower(), name, (2,)) for name in chosen)
    arrays = {
        spec.name: np.full((rows, 2), b"\xff", object)
        if spec.datatype == "BYTES"
        else np.ones((rows, 2), DATATYPES[spec.datatype].numpy)
        for spec in specs
    }
    writer = AnswerWriter("m", "2", Signature((), specs))
    part = requests(chunk([b"{}"]), [0], counts=[rows], form=form)
    if form.binary:
        (body,), (length,) = writer.binary_bodies(Answer(part, arrays))
        text = body[: int(length)]
    else:
        (text,) = writer.json_bodies(Answer(part, arrays))
    for each in (text, mark(text, payload_hash(b"x"))):
        VALIDATORS["response"].validate(json.loads(each))
        assert msgspec.json.decode(each, type=InferenceResponse).id == "id-100"


@pytest.mark.parametrize("code", list(Code))
def test_every_error_meets_the_schema_and_the_type(code: Code) -> None:
    """Marked or not."""
    body = error_body("no", code, "a")
    for each in (body, mark(body, payload_hash(b"x"))):
        VALIDATORS["error"].validate(json.loads(each))
        assert msgspec.json.decode(each, type=ErrorOutcome).code == code


# Headers


def _meet(headers: list[tuple[str, bytes | None]], rules: tuple[HeaderRule, ...], *, when: set[str]) -> None:
    """Every header is in the table and fits its pattern; all that must be there is there."""
    table = {rule.name: rule for rule in rules}
    for name, value in headers:
        assert value is not None
        assert re.fullmatch(table[name].pattern, value.decode()), (name, value)
    wanted = {rule.name for rule in rules if rule.presence in when}
    assert wanted <= {name for name, _ in headers}


def _plan() -> RoutePlan:
    return route_plan(signature(IMAGE, outputs=OUTPUTS))


def test_the_headers_of_outcomes_are_those_of_the_table() -> None:
    """Answers, binary answers and errors carry what the table says and nothing else."""
    plan = _plan()
    served = served_header(plan.variants[0].served, "w-3")
    part = requests(chunk([b"{}"]), [0], traces=[b"00-ab"])
    (plain,) = ok_headers(part, served)
    _meet(plain, OUTCOME_HEADERS, when={"always"})
    (binary,) = ok_headers(part, served, [b"10"])
    _meet(binary, OUTCOME_HEADERS, when={"always", "binary"})
    for header in (served, plan.failed_header):
        _meet(error_headers("a", Code.SHAPE, header, None), OUTCOME_HEADERS, when={"always", "errors"})


def test_the_headers_of_dead_letters_are_those_of_the_table_in_its_order() -> None:
    """Behind the request's own."""
    of = chunk([b"x"], [[("own", b"1")]])
    failed = Failures(of, [0], ["a"], [Code.SHAPE], ["no\nmore"], [None], [None])
    stamp = b"%d" % FakeClock().utc_ms()
    made = dead_letter_headers(of, 0, failed.codes[0], failed.texts[0], _plan().failed_header, stamp)
    assert made[0] == ("own", b"1")
    always = [rule.name for rule in DEAD_LETTER_HEADERS if rule.presence == "always"]
    assert [name for name, _ in made[1:]] == always
    _meet(made[1:], DEAD_LETTER_HEADERS, when={"always"})


_WORDS = st.text(st.sampled_from("019-ab. {}/;"), max_size=6) | st.sampled_from(
    ["v2", "2", "1.0", "0.3", "identity", "application/json", "application/octet-stream; a=b", "m", "5"]
)


def test_what_asks_for_another_attempt_meets_its_table() -> None:
    """The headers behind the original ones are exactly the table's, in its order."""
    record = chunk([b"body"])
    made = retry_headers(record, 0, "named", attempt=2, not_before_ms=1_700_000_000_000)
    assert [name for name, _ in made] == [rule.name for rule in RETRY_HEADERS] == list(OURS)
    _meet(made, RETRY_HEADERS, when={"always"})


@pytest.mark.parametrize("rule", REQUEST_HEADERS, ids=lambda rule: rule.name)
@given(value=_WORDS)
def test_what_a_request_headers_pattern_refuses_the_decoder_refuses(rule: HeaderRule, value: str) -> None:
    """No pattern is stricter than the code that reads the header."""
    if re.fullmatch(rule.pattern, value.strip()):
        return
    body = b'{"inputs":[{"name":"image","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}'
    decoded = decoder(signature(IMAGE)).decode(chunk([body], [[(rule.name, value.encode())]]))
    assert codes(decoded) != {}


# Routing


def test_the_routing_vectors_follow_the_published_formula() -> None:
    """Hash, bucket and steering agree, over all the lengths at which xxh3 changes its ways."""
    vectors = json.loads((FOLDER / "routing-vectors.json").read_text(encoding="utf-8"))["vectors"]
    assert len({len(vector["key_hex"]) for vector in vectors}) > 5
    for vector in vectors:
        key = bytes.fromhex(vector["key_hex"])
        digest = int(vector["hash_hex"], 16)
        assert xxhash.xxh3_64_intdigest(vector["salt"].encode() + b":" + key) == digest
        assert digest * BUCKETS // 2**64 == vector["bucket"]
        bounds = sorted({*(b for b in (vector["bucket"], vector["bucket"] + 1) if b > 0), BUCKETS})
        owner = Steering(vector["salt"], bounds).variant(key)
        assert ([0, *bounds][owner], bounds[owner]) == (vector["bucket"], vector["bucket"] + 1)


def test_the_hash_is_the_published_xxh3() -> None:
    """Its authors' own test values, so that the vectors are not only true to themselves."""
    assert xxhash.xxh3_64_intdigest(b"") == 0x2D06800538D394C2
    assert xxhash.xxh3_64_intdigest(b"a") == 0xE6C632B61E964E1F
    assert xxhash.xxh3_64_intdigest(b"abc") == 0x78AF5F94892F3950
