"""Routes are parsed whole or refused in one line; ranges cover all buckets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.cli.route import route_toml
from inferfleet.errors import ConfigError
from inferfleet.routes import BUCKETS, Destination, Shadow, Variant, load_routes, parse_routes
from inferfleet.variants import bucket_counts

BASE = '[[route]]\nname = "a"\nsource = "kafka:in"\nresults = ["kafka:out", "redis"]\nmodel = "m"\n'
ONE = BASE + 'version = "1"\n'
TWO = BASE + (
    'variants = [{ name = "stable", version = "1", weight = 95 }, '
    '{ name = "canary", version = "2", weight = 5 }]\n'
)


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_routes(text, "f", "routes.toml")
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("routes.toml")
    return said


def test_the_short_form_is_one_variant_over_all_buckets() -> None:
    """version alone means one stable variant, with the contract's defaults."""
    (route,) = parse_routes(ONE, "f", "x").routes

    assert route.variants == (Variant("stable", "1", 1.0, ((0, BUCKETS),)),)
    assert route.source == Destination("kafka", "in")
    assert route.results == (Destination("kafka", "out"), Destination("redis", ""))
    assert (route.pool, route.salt, route.split_by, route.input) == ("default", "f/a", "key", "v2")
    assert (route.order, route.nan, route.time, route.ttl_s) == ("none", "error", "record", None)


def test_weights_become_adjacent_ranges() -> None:
    """95 to 5 splits 10,000 buckets at 9,500."""
    (route,) = parse_routes(TWO, "f", "x").routes

    assert [each.ranges for each in route.variants] == [((0, 9500),), ((9500, 10000),)]
    assert route.variant_at(9499).name == "stable"
    assert route.variant_at(9500).name == "canary"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BASE, 'route "a": needs version or variants'),
        (BASE + 'version = "latest"', 'name the number, such as "1"'),
        (TWO.replace('version = "2"', 'version = "latest"'), 'name the number, such as "1"'),
        (BASE + "version = 1", 'version is 1, must be a positive whole number as text, such as "1"'),
        (BASE + 'version = "01"', "must be a positive whole number"),
        (BASE + 'verison = "1"', 'no key "verison"; did you mean "version"?'),
        (BASE + "varaints = []", 'did you mean "variants"?'),
        (TWO + 'version = "1"', "has both version and variants"),
        (ONE + "shadows = [{ name = 's' }]", "needs the key"),
        (ONE.replace("kafka:in", "rabbitmq:in/x"), "a source is a queue, rabbitmq:QUEUE, without a slash"),
        (ONE.replace("kafka:in", "rabbitmq:a b"), "a name is at most 255 bytes"),
        (ONE.replace('"redis"', '"rabbitmq:out"'), "rabbitmq:/QUEUE reaches a queue by its name"),
        (ONE.replace('"redis"', '"reply"'), "only requests from a rabbitmq:QUEUE can have"),
        (ONE.replace("kafka:in", "redis"), "must be kafka:TOPIC or rabbitmq:QUEUE"),
        (ONE.replace("kafka:in", "rabbit:in"), 'did you mean "rabbitmq"?'),
        (ONE.replace("kafka:in", "kafak:in"), 'did you mean "kafka"?'),
        (ONE.replace("kafka:in", "kafka:a b"), "a topic has at most 249"),
        (ONE.replace("kafka:out", "kafka:in"), "would answer its own answers"),
        (ONE.replace('"redis"', '"kafka:out"'), "names a destination twice"),
        (ONE.replace('["kafka:out", "redis"]', "[]"), 'must be a list such as ["kafka:TOPIC", "redis"]'),
        (ONE + 'split_by = "header:"', 'must be "key", "id" or "header:NAME"'),
        (ONE + "ttl_s = 0", "ttl_s is 0, must be a whole number >= 1"),
        (ONE + 'order = "keys"', 'must be one of "none", "key"'),
        (ONE + ONE, 'two routes are named "a"'),
        (ONE + ONE.replace('"a"', '"b"'), 'routes "a" and "b" share the source kafka:in in pool "default"'),
        (TWO.replace("weight = 5 ", "weight = 0 "), "weight is 0, must be a number > 0"),
        (TWO.replace(", weight = 5 ", " "), 'needs the key "weight"'),
        (TWO.replace('"canary"', '"stable"'), "two variants have the same name"),
        (TWO.replace("weight = 5 ", "weight = inf "), "weight is"),
        (BASE + "variants = []", "variants must be a list of 1 to 64 tables"),
        (BASE + "variants = [1]", "a variant is a table"),
        ("[route]\nname = 'a'", "routes are written [[route]], with two brackets"),
        ("[[routes]]", 'did you mean "route"?'),
        ("[[route]]\nsource = 'kafka:x'", "route number 1 needs the key"),
        ("[[route]\n", "routes.toml:1: "),
    ],
)
def test_what_is_wrong_is_named_in_one_line(text: str, said: str) -> None:
    """Every refusal names the file, the route, the key and, where known, the mend."""
    assert said in refusal(text)


def test_a_source_may_be_shared_between_pools() -> None:
    """Two routes of different pools take from one topic, each for its own group."""
    table = parse_routes(ONE + ONE.replace('"a"', '"b"') + 'pool = "other"\n', "f", "x")

    assert [route.name for route in table.of_pool("other")] == ["b"]


def test_order_by_key_is_parsed() -> None:
    """Whether the worker can keep it is the worker's to say."""
    assert parse_routes(ONE + 'order = "key"', "f", "x").routes[0].order == "key"


def test_the_revision_is_of_the_meaning_not_of_the_spelling() -> None:
    """Comments, order of keys and of routes change nothing; a weight does."""
    other = ONE.replace('"a"', '"b"').replace("kafka:in", "kafka:in2")
    revision = parse_routes(ONE + other, "f", "x").revision

    assert parse_routes(f"# hello\n{other}{ONE}", "f", "y").revision == revision
    assert parse_routes(ONE + 'split_by = "key"\n' + other, "f", "x").revision == revision
    assert parse_routes(ONE + 'split_by = "id"\n' + other, "f", "x").revision != revision
    assert len(revision) == 12
    assert int(revision, 16) >= 0


def test_an_unknown_name_gets_the_nearest() -> None:
    """named() refuses with a suggestion, or with all names."""
    table = parse_routes(ONE.replace('"a"', '"digits"'), "f", "x")

    assert table.named("digits").name == "digits"
    with pytest.raises(ConfigError, match='no route is named "digit"; did you mean "digits"'):
        table.named("digit")
    with pytest.raises(ConfigError, match="there are: digits"):
        table.named("zzz")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The path stands in the line."""
    with pytest.raises(ConfigError, match=r"routes file .*routes.toml does not exist"):
        load_routes(tmp_path / "routes.toml", "f")
    (tmp_path / "routes.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text"):
        load_routes(tmp_path / "routes.toml", "f")


weights = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=64)


@given(weights)
def test_bucket_counts_cover_all_and_give_each_at_least_one(given_weights: list[float]) -> None:
    """Shares sum to all buckets, none is empty, and none is off by more than the minimum shares cost."""
    counts = bucket_counts(given_weights)

    assert sum(counts) == BUCKETS
    assert min(counts) >= 1
    total = sum(given_weights)
    for count, weight in zip(counts, given_weights, strict=True):
        assert abs(count - weight * BUCKETS / total) <= 1 + len(given_weights)


def test_equal_weights_differ_by_one_bucket_at_most() -> None:
    """Largest remainder: the first get what is left over."""
    assert bucket_counts([1, 1, 1]) == [3334, 3333, 3333]
    assert bucket_counts([1e-9, 1]) == [1, 9999]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(deadline=None)
@given(
    weights,
    texts,
    st.sampled_from(["key", "id", "header:x-tenant"]),
    st.none() | st.integers(1, 10**6),
    st.none() | st.floats(0, 60_000),
    st.lists(st.tuples(st.floats(0.0001, 1), st.floats(0, 1)), max_size=3),
    st.sampled_from([None, "primary"]),
    st.booleans(),
)
def test_a_route_written_as_toml_reads_back_the_same(
    given_weights: list[float],
    salt: str,
    split_by: str,
    ttl_s: int | None,
    delay: float | None,
    samples: list[tuple[float, float]],
    shadow_of: str | None,
    in_pieces: bool,
) -> None:
    """route show --toml loses nothing."""
    lines = ", ".join(
        f'{{ name = "v{i}", version = "{i + 1}", weight = {w!r} }}' for i, w in enumerate(given_weights)
    )
    (route,) = parse_routes(BASE + f"variants = [{lines}]\nsplit_by = '{split_by}'", "f", "x").routes
    changed: dict[str, Any] = {"salt": salt, "ttl_s": ttl_s, "max_queue_delay_ms": delay}
    changed["shadows"] = tuple(Shadow(f"s{i}", "7", *each) for i, each in enumerate(samples))
    changed["warm"] = ("5", "6")[: len(samples)]
    if shadow_of is not None:
        changed |= {"shadow_of": shadow_of, "results": ()}
    if in_pieces and len(given_weights) > 1:
        # The last variant takes the first bucket, so that the ranges are not what the weights alone give.
        first, *between, last = route.variants
        pieces = ((0, 1), *last.ranges)
        rest = first._replace(ranges=((1, first.ranges[0][1]),) if first.buckets > 1 else first.ranges)
        if first.buckets > 1:
            changed["variants"] = (rest, *between, last._replace(ranges=pieces))
    route = type(route)(**{name: getattr(route, name) for name in route.__struct_fields__} | changed)

    assert parse_routes(route_toml(route), "other", "x").routes == (route,)


@given(st.text(max_size=200))
def test_any_document_is_read_or_refused(text: str) -> None:
    """Whatever stands in the file, the outcome is routes or one line."""
    try:
        parse_routes(text, "f", "x")
    except ConfigError as error:
        said = str(error)
    else:
        said = "x"

    assert said.startswith("x")


def test_a_shadow_needs_a_queue_of_its_own() -> None:
    """Two consumers of one queue share its messages: the primary would miss those that the shadow takes."""
    text = """
[[route]]
name = "digits"
source = "rabbitmq:q"
results = ["redis"]
model = "m"
version = "1"
[[route]]
name = "shade"
source = "rabbitmq:{queue}"
shadow_of = "digits"
model = "m"
version = "2"
pool = "shade"
"""
    with pytest.raises(ConfigError, match="give it a queue of its own"):
        parse_routes(text.format(queue="q"), "f", "routes.toml")
    assert len(parse_routes(text.format(queue="q.shade"), "f", "routes.toml").routes) == 2
