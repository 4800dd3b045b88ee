"""Which dead letters are meant, which go again, and as what."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from inferfleet.cli import cli
from inferfleet.cli.deadletters import mark
from inferfleet.cli.letters import (
    Choice,
    DeadLetter,
    Wanted,
    instant_ms,
    original_headers,
    redriven_headers,
    without_ours,
)
from inferfleet.cli.pace import Pace
from inferfleet.cli.redrive import batches
from inferfleet.cli.redriving import redriving
from inferfleet.config import parse
from inferfleet.errors import ConfigError
from inferfleet.records import Amqp, Header
from inferfleet.routes import Route, parse_routes

NOW_MS = 1_790_000_000_000
OURS: list[Header] = [
    ("inferfleet-origin-topic", b"in"),
    ("inferfleet-origin-partition", b"2"),
    ("inferfleet-origin-offset", b"7"),
    ("inferfleet-origin-timestamp", b"1789999000000"),
    ("inferfleet-code", b"E_MODEL"),
    ("inferfleet-error", b"boom"),
    ("inferfleet-attempt", b"4"),
    ("inferfleet-failed-at", b"1790000000000"),
    ("inferfleet-served", b"route=r;model=m;version=2;variant=stable;revision=x;worker=w"),
]


def letter(
    *given: Header, body: bytes = b"{}", code: bytes = b"E_MODEL", offset: int = 1, amqp: Amqp | None = None
) -> DeadLetter:
    ours = [(name, code if name == "inferfleet-code" else value) for name, value in OURS]
    return DeadLetter("in.dlt", 0, offset, b"k", body, (*given, *ours), amqp)


def a_route(**keys: object) -> Route:
    more = "".join(f"{key} = {value}\n" for key, value in keys.items())
    text = (
        f'[[route]]\nname = "r"\nsource = "kafka:in"\nresults = ["redis"]\nmodel = "m"\nversion = "1"\n{more}'
    )
    return parse_routes(text, "f", "x").routes[0]


def test_what_the_caller_sent_is_all_that_was_not_added() -> None:
    """A caller's header of one of our names is the caller's: ours is the last."""
    given: list[Header] = [("a", b"1"), ("inferfleet-code", b"mine"), ("inferfleet-attempt", None)]

    assert original_headers(letter(*given)) == given


def test_a_redriven_record_starts_anew_at_its_first_place() -> None:
    """The origin stays, the attempt is 1, and nothing says that it failed."""
    headers = redriven_headers(letter(("inferfleet-id", b"a"), ("x", None)), NOW_MS)

    assert headers == [
        ("inferfleet-id", b"a"),
        ("x", None),
        *OURS[:4],
        ("inferfleet-attempt", b"1"),
        ("inferfleet-not-before-ms", b"1790000000000"),
    ]


@pytest.mark.parametrize(
    ("given", "body", "front"),
    [
        ([("inferfleet-id", b"a")], b"{}", None),
        ([("ce_id", b"a")], b"{}", None),
        ([("inferfleet-id", b"{bad}")], b"{}", None),
        ([], b'{"id": "own", "inputs": []}', None),
        ([], b"not json", b"in-2-7"),
        ([("inference-header-content-length", b"0")], b'{"id": "bytes of a tensor"}', b"in-2-7"),
        ([("inference-header-content-length", b"13")], b'{"id": "own"}binary', None),
    ],
)
def test_an_id_is_put_in_front_only_where_the_request_has_none(
    given: list[Header], body: bytes, front: bytes | None
) -> None:
    """What names itself, rightly or wrongly, is named so again; all else by where it stood first."""
    first = redriven_headers(letter(*given, body=body), NOW_MS)[0]

    assert first == (("inferfleet-id", front) if front else [*given, *OURS][0])


def test_a_message_is_named_as_the_worker_named_it() -> None:
    """By its message id, else its correlation id; the table leaves without what we and the broker added."""
    amqp = Amqp(
        "reply", "corr", None, {"X": 1, "inferfleet-code": "E", "x-delivery-count": 3, "x-death": b""}
    )

    assert redriven_headers(letter(amqp=amqp), NOW_MS)[0] == ("inferfleet-id", b"corr")
    assert letter(amqp=amqp._replace(message_id="msg")).id == "msg"
    assert without_ours(amqp) == Amqp("reply", "corr", None, {"X": 1})
    assert without_ours(Amqp()) == Amqp()


def test_the_first_fault_decides_why_a_letter_stays() -> None:
    """Other letters, redriven ones, cut ones, callers' faults and late ones are told apart."""
    past = ("inferfleet-deadline-ms", b"1789999999999")
    choice = Choice(a_route(), Wanted(model="m"))
    redriven = DeadLetter("in.dlt", 0, 1, None, b"", tuple(OURS), redriven=True)
    takes = [
        choice.takes(each, NOW_MS)
        for each in (
            letter(),
            redriven,
            DeadLetter("in.dlt", 0, 5, None, b"", (*OURS, ("inferfleet-cut", b"body"))),
            letter(code=b"E_SHAPE"),
            letter(past),
            letter(code=b"E_FUTURE"),
            DeadLetter("in.dlt", 0, 9, None, b"", ()),
        )
    ]

    assert takes == [True, False, False, False, False, True, False]
    assert choice.skipped == {"redriven": 1, "cut": 1, "caller": 1, "late": 1, "other": 1}
    assert choice.chosen == {"E_MODEL": 1, "E_FUTURE": 1}
    assert choice.cut == ["0:5"]


def test_a_route_s_own_deadline_makes_letters_late() -> None:
    """It counts from when the request was sent, which a redrive does not change."""
    soon, far = a_route(deadline_ms=1000), a_route(deadline_ms=100_000_000)

    assert not Choice(soon, Wanted()).takes(letter(), NOW_MS)
    assert Choice(far, Wanted()).takes(letter(), NOW_MS)


def test_named_letters_go_whatever_their_fault() -> None:
    """By place or by id; redriven ones only on purpose, and what is not there is told."""
    named = Choice(a_route(), Wanted(), ["0:1", "b", "0:77"])

    assert named.takes(letter(code=b"E_SHAPE", offset=1), NOW_MS)
    assert named.takes(letter(("inferfleet-id", b"b"), offset=2), NOW_MS)
    assert not named.takes(letter(("inferfleet-id", b"c"), offset=3), NOW_MS)
    assert named.missing == ["0:77"]
    redriven = DeadLetter("in.dlt", 0, 1, None, b"", tuple(OURS), redriven=True)
    assert not Choice(a_route(), Wanted(), ["0:1"]).takes(redriven, NOW_MS)
    assert Choice(a_route(), Wanted(), ["0:1"], again=True).takes(redriven, NOW_MS)


def test_the_limit_ends_a_choice() -> None:
    """What is over it is counted, not taken."""
    choice = Choice(a_route(), Wanted(), limit=2)

    assert [choice.takes(letter(), NOW_MS) for _ in range(3)] == [True, True, False]
    assert choice.full
    assert choice.skipped["over"] == 1


def test_letters_that_do_not_say_when_they_failed_fit_no_time() -> None:
    """Nor does one outside the times; both ends belong to them."""
    silent = DeadLetter("in.dlt", 0, 1, None, b"", ())

    assert Wanted(since_ms=NOW_MS, until_ms=NOW_MS).fits(letter())
    assert not Wanted(until_ms=NOW_MS - 1).fits(letter())
    assert not Wanted(since_ms=NOW_MS + 1).fits(letter())
    assert not Wanted(since_ms=0).fits(silent)
    assert Wanted().fits(silent)


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2h", NOW_MS - 7_200_000),
        ("1.5m", NOW_MS - 90_000),
        ("1970-01-01T00:00:01Z", 1000),
        ("1970-01-01T00:00:01", 1000),
        ("1970-01-01T01:00:01+01:00", 1000),
    ],
)
def test_an_instant_is_iso_or_a_time_ago(text: str, ms: int) -> None:
    """Without a zone it is UTC."""
    assert instant_ms(text, NOW_MS) == ms


@pytest.mark.parametrize("text", ["2", "h", "-2h", "tomorrow", ""])
def test_what_is_no_instant_is_refused(text: str) -> None:
    """Neither form fits."""
    with pytest.raises(ValueError, match=r"."):
        instant_ms(text, NOW_MS)


def test_a_pace_says_how_many_and_how_long() -> None:
    """A quarter of a second's worth at once, and what is ahead of the rate waits."""
    assert (Pace().batch, Pace().delay_s(10_000), Pace().most_within(10)) == (500, 0.0, None)
    assert (Pace(100).batch, Pace(0.1).batch, Pace(1e9).batch) == (25, 1, 500)
    assert 0.9 < Pace(10).delay_s(10) <= 1.0
    assert (Pace(2).most_within(900), Pace(0.001).most_within(900)) == (1800, 1)


def test_batches_are_bounded_by_count_and_bytes() -> None:
    """One that is larger than the bound goes alone."""
    letters = [letter(body=b"x" * size) for size in (10, 10, 100, 10, 10, 10)]

    assert [[len(each.body) for each in batch] for batch in batches(letters, 2, 50)] == [
        [10, 10],
        [100],
        [10, 10],
        [10],
    ]


def test_a_mark_names_offsets() -> None:
    """Its one header tells it from a letter."""
    assert mark([3, 5]) == (b'{"offsets":[3,5]}', [("inferfleet-redriven", b"2")])


def test_without_a_retry_topic_there_is_no_way_back() -> None:
    """The mend differs: one delay, or bytes sent by hand where an order is kept."""
    none = parse("[retry]\ndelays_ms = []\n")
    with (
        pytest.raises(ConfigError, match=r"\[retry\] delays_ms is empty.*topics plan --apply"),
        redriving(none, a_route()),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r'keeps order = "key".*dlt show r PLACE --raw'),
        redriving(parse(""), a_route(order='"key"')),
    ):
        pass


def test_wrong_filters_are_wrong_use(tmp_path: Path) -> None:
    """Codes, times and rates are checked before anything is asked."""
    for words in (["--code", "E_SHAP"], ["--since", "soon"], ["--rate", "0/s"], ["--rate", "x"]):
        given = ["--config", str(tmp_path / "none.toml"), "dlt", "redrive", "r", "--yes", *words]
        assert CliRunner().invoke(cli, given).exit_code == 2
