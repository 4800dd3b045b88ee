"""What today's release stores, frozen: later ones must read it, for both run side by side on one Redis.

The files are never written anew. A form that changes gets a further file, and readers of both.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest

from inferfleet.control.logbook import decode_head
from inferfleet.control.pauses import decode_pause
from inferfleet.coordinator.evidence import Gathering
from inferfleet.core.audit_chain import Chain, digest, follow
from inferfleet.errors import ConfigError
from inferfleet.plane import AuditEntry, WorkerReport, braked_version
from inferfleet.revisions import parse_revision
from inferfleet.rollouts import decode_rollout, encode_rollout
from inferfleet.routes import plain_route
from inferfleet.summaries import Window, decode_window
from tests.support.rollout_fleet import RolloutFleet

FROZEN = Path(__file__).parent / "frozen"
REVISION = "e5c4e12c9d30d6681a71dabdfa59ffd2b259a661763402f4f32df6ccc79518dc"
ANNOUNCEMENT = "e93a1edb87393b4bcca08b2668a36eba8c5ee53b2ca4b392516754a95320e68c"
REMOVAL = "87db097bdc96a829bb213357132193e935f1d85c5ed8e5fea3f00c4eab58a94f"
ENTRY = "9b3418e29891555920d3032568fdab37a08fca326c020b0d18e46b2f073cf411"


def stored(name: str) -> bytes:
    """Return a document as it lies in Redis."""
    body = (FROZEN / name).read_bytes()
    return base64.b64decode(body) if name.endswith(".b64") else body.removesuffix(b"\n")


def with_more(body: bytes) -> bytes:
    """Return a JSON document of a release that says more than this one knows."""
    return msgspec.json.encode({**msgspec.json.decode(body), "new_in_a_later_release": {"x": [1]}})


@pytest.mark.parametrize(
    ("name", "known"),
    [("revision.json", REVISION), ("announcement.json", ANNOUNCEMENT), ("removal.json", REMOVAL)],
)
def test_a_revision_is_read_whole_and_keeps_its_place_in_the_chain(name: str, known: str) -> None:
    """Its hash is that of the stored bytes; every key of its route comes back as it was written."""
    body = stored(name)
    found = parse_revision(body, "fleet")

    assert found.hash == known
    written = msgspec.json.decode(body)["route"]
    assert written == (None if found.route is None else plain_route(found.route))
    more = parse_revision(with_more(body), "fleet")
    assert more.route == found.route
    assert more.hash != known, "what is unknown is part of the chain all the same"


def test_a_route_that_says_what_is_not_known_is_not_guessed_at() -> None:
    """A key of a later release may change what answers: the route stays as it was, and workers say so."""
    body = msgspec.json.decode(stored("revision.json"))
    body["route"]["new_in_a_later_release"] = 1

    with pytest.raises(ConfigError, match="new_in_a_later_release"):
        parse_revision(msgspec.json.encode(body), "fleet")


def test_revisions_link_to_each_other() -> None:
    """The chain of the three files is whole."""
    first, second, third = (
        parse_revision(stored(f"{name}.json"), "fleet") for name in ("revision", "announcement", "removal")
    )

    assert (second.previous, third.previous) == (first.hash, second.hash)
    assert second.effective_from_ms is None
    assert third.route is None
    assert decode_head(stored("head.json")).head == second.head


def test_a_workers_report_is_read_and_what_it_leaves_out_is_nothing() -> None:
    """A worker of an earlier release says less, one of a later release more."""
    found = msgspec.json.decode(stored("worker-report.json"), type=WorkerReport)
    assert (found.worker, found.pool, found.ready) == ("w-0", "default", ["digits:1", "digits:2"])
    assert found.refused == {"digits:4": "bad operator"}
    assert braked_version(found.paused["digits"]) == "2"
    assert found.head.number == found.adopted["digits"]

    assert msgspec.json.decode(with_more(stored("worker-report.json")), type=WorkerReport) == found
    least = msgspec.json.decode(b'{"worker": "old", "pool": "default"}', type=WorkerReport)
    assert (least.adopted, least.ready, least.draining) == ({}, [], False)


def test_a_window_is_read_and_what_it_leaves_out_is_nothing() -> None:
    """Sums of workers of several releases are added up."""
    found = decode_window(stored("window.msgpack.b64"))
    assert (found.role, found.requests, found.failures.events, len(found.latency)) == ("shadow", 3, 1, 3)
    assert found.key_groups == {5: (3, 1)}
    assert found.comparison is not None
    assert found.comparison.flips == {"3>4": 1}
    assert found.comparison.examples[0].id == "r-1"

    plain: dict[str, Any] = msgspec.msgpack.decode(stored("window.msgpack.b64"), strict=False)
    assert decode_window(msgspec.msgpack.encode({**plain, "new_in_a_later_release": 1})) == found
    least: dict[str, Any] = {
        "worker": "old",
        "route": "digits",
        "model": "digits",
        "version": "1",
        "variant": "stable",
    }
    assert decode_window(msgspec.msgpack.encode(least)) == Window(**least)


def test_a_rollout_goes_on_from_what_is_stored() -> None:
    """State, policy, approvals and sums: whoever leads after an upgrade has all of them."""
    body = stored("rollout.json")
    found = decode_rollout(body)
    assert (found.phase, found.next_percent, found.policy.gate_before) == ("gate", 50, (50, 100))
    (approval,) = found.approvals
    assert (approval.actor, approval.digest, approval.policy) == ("bob", found.digest, found.policy_hash)
    assert found.before.variants[0].version == "1"
    assert {each.name for each in found.current.variants} == {"stable", "control", "canary"}
    assert decode_rollout(encode_rollout(found)) == found
    assert decode_rollout(with_more(body)) == found

    fleet = RolloutFleet(rate=0)
    evidence = Gathering(found, fleet.plane, stored("evidence.msgpack.b64")).evidence
    assert evidence.arm("canary").requests >= 50
    assert evidence.heard_ms > found.begun_ms


def test_an_audit_entry_keeps_its_hash() -> None:
    """A later release verifies what an earlier one has written, by the stored bytes."""
    body = stored("audit-entry.json")
    found = msgspec.json.decode(body, type=AuditEntry)

    assert (found.actor, found.action) == ("bob", "rollout approve")
    assert isinstance(follow(Chain(), found, body), Chain)
    assert digest(body) == ENTRY


def test_a_pause_is_read() -> None:
    """Coordinators read from its reason which version was stopped."""
    assert braked_version(decode_pause(stored("pause.json")).reason) == "2"
