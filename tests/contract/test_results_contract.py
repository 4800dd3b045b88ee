"""One suite for every result outlet: the memory twin and the real Redis keep the same rules."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest

from inferfleet.ports import Refusal, RefusalKind, ResultOutlet
from inferfleet.records import Results
from inferfleet.redis_access import Place, open_redis
from inferfleet.results.memory import MemoryResults
from inferfleet.results.redis import OutletOptions, RedisResults
from inferfleet.wire.stored import again_key, payload_hash, payload_of, reply_key, result_key
from tests.support.redis_cluster import RedisCluster
from tests.support.waiting import wait_until

FIRST, SECOND = payload_hash(b"first payload"), payload_hash(b"second payload")
CAP = 200


class Receipts:
    """Counts what an outlet tells; fails at once when more is told than was published."""

    def __init__(self, published: int) -> None:
        self.published = published
        self.confirmed_rows = 0
        self.refusals: dict[int, Refusal] = {}
        self.threads: set[int] = set()

    @property
    def told(self) -> int:
        return self.confirmed_rows + len(self.refusals)

    def confirmed(self, count: int) -> None:
        self.threads.add(threading.get_ident())
        self.confirmed_rows += count
        assert 0 < self.told <= self.published

    def refused(self, index: int, refusal: Refusal) -> None:
        self.threads.add(threading.get_ident())
        assert index not in self.refusals
        self.refusals[index] = refusal
        assert self.told <= self.published


class Answer(NamedTuple):
    id: str
    route: str
    status: str
    body: bytes


class Store:
    """An outlet with eyes: reads back what stands behind it."""

    def __init__(
        self,
        outlet: ResultOutlet,
        get: Callable[[str, str], bytes | None],
        ttl_s: Callable[[str, str], float],
        replies: Callable[[str], list[Answer]],
        stood: dict[str, int],
        again: Callable[[str, str], dict[str, int]],
    ) -> None:
        self.outlet, self.get, self.ttl_s, self.replies, self.stood = outlet, get, ttl_s, replies, stood
        self.again = again

    def write(self, results: Results) -> Receipts:
        receipts = Receipts(len(results))
        self.outlet.publish(results, receipts)
        wait_until(lambda: self._told(receipts), 10, "every row is confirmed or refused")
        return receipts

    def _told(self, receipts: Receipts) -> bool:
        self.outlet.poll()
        return receipts.told == receipts.published


def _memory() -> Iterator[Store]:
    stood: dict[str, int] = {}

    def count(route: str, rows: int) -> None:
        stood[route] = stood.get(route, 0) + rows

    outlet = MemoryResults(stood=count, reply_max_len=CAP)
    yield Store(
        outlet,
        lambda route, id_: found.body if (found := outlet.results.get((route, id_))) else None,
        lambda route, id_: outlet.results[route, id_].ttl_s,
        lambda name: [Answer(*reply) for reply in outlet.replies.get(name, [])],
        stood,
        lambda route, id_: dict(outlet.again.get((route, id_), {})),
    )
    outlet.close(1)


def _redis(place: Place) -> Iterator[Store]:
    fleet = f"test-{secrets.token_hex(4)}"
    stood: dict[str, int] = {}

    def count(route: str, rows: int) -> None:
        stood[route] = stood.get(route, 0) + rows

    def again(route: str, id_: str) -> dict[str, int]:
        key = again_key(fleet, route, id_)
        counts = {field.decode(): int(count) for field, count in client.hgetall(key).items()}
        assert not counts or 50 < client.pttl(key) / 1000 <= 60
        return counts

    def replies(name: str) -> list[Answer]:
        entries = client.xrange(reply_key(fleet, name))
        return [
            Answer(
                fields[b"id"].decode(), fields[b"route"].decode(), fields[b"status"].decode(), fields[b"body"]
            )
            for _, fields in entries
        ]

    options = OutletOptions(reply_max_len=CAP, rows_per_step=7)
    outlet = RedisResults(lambda: open_redis(place), fleet, wake=lambda: None, stood=count, options=options)
    with open_redis(place) as client:
        yield Store(
            outlet,
            lambda route, id_: client.get(result_key(fleet, route, id_)),
            lambda route, id_: client.pttl(result_key(fleet, route, id_)) / 1000,
            replies,
            stood,
            again,
        )
        assert outlet.close(5) == 0


@pytest.fixture(
    params=[
        "memory",
        pytest.param("redis", marks=pytest.mark.service),
        pytest.param("redis-cluster", marks=pytest.mark.service),
    ]
)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "memory":
        yield from _memory()
    elif request.param == "redis":
        yield from _redis(Place(request.getfixturevalue("redis_server").url))
    else:
        cluster: RedisCluster = request.getfixturevalue("redis_cluster")
        yield from _redis(Place(mode="cluster", nodes=cluster.addresses))


def ok(text: str) -> bytes:
    return json.dumps({"model_name": "m", "model_version": "1", "outputs": [text]}).encode()


def failed(text: str) -> bytes:
    return json.dumps({"error": text, "code": "E_MODEL", "retryable": False}).encode()


def rows(
    bodies: Sequence[bytes],
    *,
    ids: Sequence[str] | None = None,
    payloads: Sequence[str] | None = None,
    replies: list[str | None] | None = None,
    route: str = "digits",
    reply_only: bool = False,
) -> Results:
    names = list(ids) if ids is not None else [f"id-{n}" for n in range(len(bodies))]
    hashes = list(payloads) if payloads is not None else [FIRST] * len(bodies)
    good = [not body.startswith(b'{"error"') for body in bodies]
    return Results(route, names, list(bodies), good, hashes, replies, 60, reply_only)


def said(body: bytes | None) -> object:
    """The outputs or the error text of a stored body, which must be valid JSON."""
    assert body is not None
    document = json.loads(body)
    return document.get("error") or document["outputs"][0]


def test_a_result_stands_under_its_key_as_json_with_a_lifetime(store: Store) -> None:
    """The key holds the body's JSON, plus the payload's mark, and expires."""
    receipts = store.write(rows([ok("one")]))
    body = store.get("digits", "id-0")
    assert body is not None
    assert json.loads(body) == {**json.loads(ok("one")), "parameters": {"fleet_payload": FIRST}}
    assert payload_of(body) == FIRST
    assert 50 < store.ttl_s("digits", "id-0") <= 60
    assert receipts.confirmed_rows == 1


def test_a_body_without_a_payload_hash_is_stored_unchanged(store: Store) -> None:
    """Where nobody knows the payload, nothing is added and nothing can differ."""
    store.write(rows([ok("one")], payloads=[""]))
    assert store.get("digits", "id-0") == ok("one")
    assert not store.write(rows([ok("two")], payloads=[SECOND])).refusals
    assert said(store.get("digits", "id-0")) == "one"


def test_an_ok_never_changes(store: Store) -> None:
    """Neither another ok nor an error of the same payload replaces an ok; both are confirmed."""
    store.write(rows([ok("one")]))
    assert store.write(rows([ok("two")])).confirmed_rows == 1
    assert store.write(rows([failed("late")])).confirmed_rows == 1
    assert said(store.get("digits", "id-0")) == "one"
    assert store.stood == {"digits": 2}


def test_an_ok_replaces_an_error(store: Store) -> None:
    """A request that failed and was fixed or redriven gets its answer, whatever its payload."""
    store.write(rows([failed("a"), failed("b")]))
    receipts = store.write(rows([ok("one"), ok("two")], payloads=[FIRST, SECOND]))
    assert receipts.confirmed_rows == 2
    assert said(store.get("digits", "id-0")) == "one"
    assert said(store.get("digits", "id-1")) == "two"
    assert store.stood == {}


def test_an_error_never_replaces_an_error(store: Store) -> None:
    """The first error stands."""
    store.write(rows([failed("first")]))
    receipts = store.write(
        rows([failed("second"), failed("third")], ids=["id-0"] * 2, payloads=[FIRST, SECOND])
    )
    assert receipts.confirmed_rows == 2
    assert said(store.get("digits", "id-0")) == "first"


def test_another_payload_under_an_answered_id_is_refused(store: Store) -> None:
    """Neither its answer nor its error is stored or sent; the rows beside it are confirmed."""
    store.write(rows([ok("one")]))
    receipts = store.write(
        rows(
            [ok("x"), ok("two"), failed("y")],
            ids=["id-0", "id-1", "id-0"],
            payloads=[SECOND] * 3,
            replies=["c"] * 3,
        )
    )
    assert receipts.confirmed_rows == 1
    assert {i: refusal.kind for i, refusal in receipts.refusals.items()} == {
        0: RefusalKind.DUPLICATE_ID,
        2: RefusalKind.DUPLICATE_ID,
    }
    assert "id-0" in receipts.refusals[0].text
    assert said(store.get("digits", "id-0")) == "one"
    assert [answer.id for answer in store.replies("c")] == ["id-1"]


def test_the_same_id_twice_in_one_group_keeps_the_first(store: Store) -> None:
    """Rows of one group are judged in their order."""
    receipts = store.write(
        rows([ok("one"), ok("two"), ok("x")], ids=["i"] * 3, payloads=[FIRST, FIRST, SECOND])
    )
    assert said(store.get("digits", "i")) == "one"
    assert receipts.confirmed_rows == 2
    assert list(receipts.refusals) == [2]


def test_the_same_id_on_two_routes_is_two_results(store: Store) -> None:
    """An id belongs to its route."""
    store.write(rows([ok("one")], route="digits"))
    receipts = store.write(rows([ok("two")], route="files", payloads=[SECOND]))
    assert receipts.confirmed_rows == 1
    assert said(store.get("digits", "id-0")) == "one"
    assert said(store.get("files", "id-0")) == "two"


def test_what_comes_again_is_counted_beside_the_value(store: Store) -> None:
    """An equal value counts as ``same``, another one as ``differs``, whatever became of the row."""
    store.write(rows([ok("one")]))
    assert store.again("digits", "id-0") == {}
    store.write(rows([ok("one"), ok("one"), ok("two"), failed("late")], ids=["id-0"] * 4))
    assert store.again("digits", "id-0") == {"same": 2, "differs": 2}
    store.write(rows([ok("one")], payloads=[SECOND]))
    assert store.again("digits", "id-0") == {"same": 2, "differs": 3}


def test_a_value_without_a_mark_is_compared_bare(store: Store) -> None:
    """Who does not know the payload is not told apart by the mark alone."""
    store.write(rows([ok("one"), ok("one")], payloads=[FIRST, ""]))
    store.write(rows([ok("one"), ok("one")], payloads=["", FIRST]))
    store.write(rows([ok("two"), ok("two")], payloads=["", FIRST]))
    assert store.again("digits", "id-0") == {"same": 1, "differs": 1}
    assert store.again("digits", "id-1") == {"same": 1, "differs": 1}


def test_an_answer_that_repairs_an_error_counts_as_nothing(store: Store) -> None:
    """An ``ok`` over an error is a first value; an error over an error is counted."""
    store.write(rows([failed("bad"), failed("bad"), failed("bad")]))
    store.write(rows([ok("one"), failed("bad"), failed("worse")]))
    found = [store.again("digits", f"id-{n}") for n in range(3)]
    assert found == [{}, {"same": 1}, {"differs": 1}]


def test_a_reply_alone_counts_nothing(store: Store) -> None:
    """Rows that are not kept come beside the value, not after it."""
    store.write(rows([ok("one")]))
    store.write(rows([ok("one")], replies=["c"], reply_only=True))
    assert store.again("digits", "id-0") == {}


def test_a_reply_carries_the_value_that_stands(store: Store) -> None:
    """Who waits hears the first value, also when this row came second; rows without a name send nothing."""
    store.write(rows([ok("one"), failed("bad"), ok("silent")], replies=["c", "c", None]))
    store.write(rows([ok("other"), failed("worse")], replies=["d", "d"]))
    assert [(a.id, a.route, a.status, said(a.body)) for a in store.replies("c")] == [
        ("id-0", "digits", "ok", "one"),
        ("id-1", "digits", "error", "bad"),
    ]
    assert [(a.id, a.status, said(a.body)) for a in store.replies("d")] == [
        ("id-0", "ok", "one"),
        ("id-1", "error", "bad"),
    ]


def test_an_error_for_another_payload_answers_its_own_client(store: Store) -> None:
    """The first error stands in the key, and the second client hears of its own payload's error."""
    store.write(rows([failed("first")]))
    store.write(rows([failed("second")], payloads=[SECOND], replies=["c"]))
    assert [said(answer.body) for answer in store.replies("c")] == ["second"]


def test_a_reply_alone_stores_nothing(store: Store) -> None:
    """``reply_only`` tells the client and leaves the result as it is; without a name it is just confirmed."""
    store.write(rows([ok("one")]))
    receipts = store.write(
        rows([failed("duplicate"), failed("x")], payloads=[SECOND] * 2, replies=["c", None], reply_only=True)
    )
    assert receipts.confirmed_rows == 2
    assert [(a.status, said(a.body)) for a in store.replies("c")] == [("error", "duplicate")]
    assert said(store.get("digits", "id-0")) == "one"
    assert store.get("digits", "id-1") is None


def test_many_rows_are_confirmed_once_each_and_all_stand(store: Store) -> None:
    """Groups larger and smaller than a step, from several routes, lose and double nothing."""
    bodies = [ok(str(n)) for n in range(1000)]
    groups = [rows(bodies[n : n + 50], ids=[f"m-{i}" for i in range(n, n + 50)]) for n in range(0, 1000, 50)]
    groups.append(rows(bodies, route="files"))
    receipts = [Receipts(len(group)) for group in groups]
    for group, receipt in zip(groups, receipts, strict=True):
        store.outlet.publish(group, receipt)
    wait_until(lambda: store.outlet.poll() or store.outlet.pending() == 0, 20, "nothing is pending")
    assert [receipt.confirmed_rows for receipt in receipts] == [50] * 20 + [1000]
    assert all(said(store.get("digits", f"m-{n}")) == str(n) for n in range(1000))
    assert all(said(store.get("files", f"id-{n}")) == str(n) for n in range(1000))


def test_receipts_are_called_by_poll_alone(store: Store) -> None:
    """The worker loop's thread is the only one that hears of confirmations."""
    receipts = store.write(rows([ok(str(n)) for n in range(100)]))
    assert receipts.threads == {threading.get_ident()}


def test_an_empty_group_changes_nothing(store: Store) -> None:
    """No rows, no news."""
    receipts = Receipts(0)
    store.outlet.publish(rows([]), receipts)
    store.write(rows([ok("one")]))
    assert receipts.told == 0
    assert store.outlet.pending() == 0


def test_a_reply_stream_is_capped(store: Store) -> None:
    """A client that went away cannot fill the store; the cap is approximate on the real one."""
    total = CAP * 5
    store.write(rows([ok("x")] * total, ids=[f"i-{n}" for n in range(total)], replies=["c"] * total))
    kept = store.replies("c")
    assert CAP <= len(kept) <= CAP * 2
    assert kept[-1].id == f"i-{total - 1}"


def test_close_delivers_what_is_pending(store: Store) -> None:
    """After close every row has its receipt; closing twice is fine."""
    receipts = Receipts(300)
    store.outlet.publish(rows([ok(str(n)) for n in range(300)]), receipts)
    assert store.outlet.close(10) == 0
    assert receipts.confirmed_rows == 300
    assert store.outlet.close(1) == 0


def test_an_id_with_a_lone_surrogate_does_not_stop_its_neighbours(store: Store) -> None:
    """Whatever came through the decoder can be written; nothing turns into an endless retry."""
    assert store.write(rows([ok("a"), ok("b")], ids=["bad-\ud800", "good"])).confirmed_rows == 2
    assert said(store.get("digits", "good")) == "b"
