"""The published vectors of routing in event time, and a second implementation in another language."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from inferfleet.core.revisions import chain_fault, timeline
from inferfleet.core.routing import BUCKETS, Steering, bucket, sampled
from inferfleet.revisions import Revision, parse_revision, sealed
from inferfleet.routes import Route, parse_routes
from scripts.schema_files import FOLDER
from tests.support.programs import node

PROGRAM = Path(__file__).resolve().parents[1] / "interop" / "routing.mjs"
VECTORS = FOLDER / "timed-routing-vectors.json"


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads(VECTORS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    found = json.loads((FOLDER / "revision.v1.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


def revisions_of(document: Any) -> list[Revision]:
    bodies = [msgspec.json.encode(each, order="sorted") for each in document["revisions"]]
    return [parse_revision(body, "inferfleet") for body in bodies]


def run_node(*arguments: str, given: str = "") -> Any:
    """Run the second implementation and return what it prints."""
    done = subprocess.run(
        [node(), str(PROGRAM), *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_second_implementation_agrees_on_every_vector(document: Any) -> None:
    """Bucket, revision, variant and shadows of 10,000 keys at their times, by code that shares nothing."""
    answers = run_node(str(VECTORS))

    assert len(answers) == 10_000
    assert answers == document["cases"]


def test_the_second_hash_agrees_at_every_length() -> None:
    """Each length up to where blocks repeat, and some beyond."""
    lengths = [*range(260), *range(1_000, 1_100), 2_048, 2_049, 4_096, 9_999]
    texts = [bytes((i * 7 + length) % 256 for i in range(length)) for length in lengths]
    found = run_node("hashes", given=json.dumps([text.hex() for text in texts]))

    assert found == [xxhash.xxh3_64_hexdigest(text) for text in texts]


def test_the_vectors_are_what_workers_do(document: Any) -> None:
    """By the code that steers records: timeline, steering and sampling."""
    log = revisions_of(document)
    for name, key_hex, head, time_ms, at, number, variant, shadows in document["cases"]:
        known = [each for each in log if each.name == name and each.number <= head]
        revision = timeline(known).at(time_ms)
        route, key = revision.route, bytes.fromhex(key_hex)
        assert route is not None
        assert (bucket(route.salt, key), revision.number) == (at, number)
        owner = Steering.over(route.salt, [each.ranges for each in route.variants]).variant(key)
        assert route.variants[owner].name == variant
        seen = [each.name for each in route.shadows if sampled(route.shadow_salt(each), each.sample, [key])]
        assert seen == shadows


def test_the_vectors_reach_every_corner(document: Any) -> None:
    """Every revision with a time answers somewhere; every one but the hidden does so with the whole log."""
    cases, log = document["cases"], revisions_of(document)
    timed = {each.number for each in log if each.effective_from_ms is not None}

    assert {case[5] for case in cases} == timed
    assert Counter(case[0] for case in cases)["short"] > 1_000
    assert {len(case[1]) // 2 for case in cases} >= {0, 1, 8, 11}
    assert any(len(case[1]) > 2 * 1_100 for case in cases)
    assert {tuple(case[7]) for case in cases} == {(), ("all",), ("next", "all")}
    assert any(case[3] == 0 for case in cases)
    assert chain_fault(log) is None


def test_the_published_revisions_meet_their_schema_and_their_hashes(
    document: Any, schema: Draft202012Validator
) -> None:
    """Each names the hash of the one before, over bytes with sorted keys."""
    for each in document["revisions"]:
        schema.validate(each)
    for before, after in itertools.pairwise(revisions_of(document)):
        assert after.previous == before.hash


weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(weights, st.none() | st.integers(0, 2**53), st.text(max_size=20), st.booleans())
def test_every_revision_that_is_written_meets_the_schema(
    given_weights: list[float], time_ms: int | None, reason: str, is_shadow: bool
) -> None:
    """With any weights, times and words."""
    lines = ", ".join(
        f'{{ name = "v{i}", version = "{i + 1}", weight = {w!r} }}' for i, w in enumerate(given_weights)
    )
    seen = 'shadow_of = "other"' if is_shadow else 'results = ["redis"]'
    text = f"""
[[route]]
name = "r"
source = "kafka:in"
{seen}
model = "m"
variants = [{lines}]
shadows = [{{ name = "s", version = "9", sample = 0.5 }}]
warm = ["8"]
"""
    (route,) = parse_routes(text, "f", "x").routes
    for each in (route, None):
        validator().validate(json.loads(revision(each, time_ms, reason).body))


def validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads((FOLDER / "revision.v1.json").read_text(encoding="utf-8")))


def revision(route: Route | None, time_ms: int | None, reason: str) -> Revision:
    return sealed(
        Revision(
            number=1,
            epoch=0,
            name="r",
            route=route,
            effective_from_ms=time_ms,
            at_ms=0,
            author="a",
            action="apply",
            reason=reason,
        )
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"number": 0},
        {"previous": "x"},
        {"effective_from_ms": "soon"},
        {"route": {"name": "r"}},
        {"route": []},
    ],
)
def test_a_schema_that_lets_everything_pass_would_prove_nothing(
    document: Any, schema: Draft202012Validator, wrong: dict[str, Any]
) -> None:
    """What the parser refuses is refused."""
    assert not schema.is_valid(document["revisions"][0] | wrong)


@pytest.mark.parametrize("ranges", [[], [[0, BUCKETS + 1]], [[0]], [[0, 1, 2]], None])
def test_ranges_are_pairs_of_buckets(document: Any, schema: Draft202012Validator, ranges: Any) -> None:
    """And stand with each variant."""
    first = json.loads(json.dumps(document["revisions"][0]))
    if ranges is None:
        del first["route"]["variants"][0]["ranges"]
    else:
        first["route"]["variants"][0]["ranges"] = ranges

    assert not schema.is_valid(first)
