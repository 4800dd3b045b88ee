"""The stored state of a rollout: what is written is read again, and what is newer is left alone."""

from __future__ import annotations

import msgspec
import pytest

from inferfleet.errors import ConfigError
from inferfleet.policies import default_policy
from inferfleet.rollouts import FORMAT, Approval, Decision, Hold, Rollout, decode_rollout, encode_rollout
from inferfleet.routes import parse_routes

ROUTE = parse_routes(
    '[[route]]\nname = "digits"\nsource = "kafka:in"\nresults = ["redis"]\nmodel = "digits"\nversion = "1"',
    "fleet",
    "routes.toml",
).routes[0]


def a_rollout() -> Rollout:
    policy = default_policy()
    return Rollout(
        id="digits-1",
        route="digits",
        kind="canary",
        policy=policy,
        policy_hash=policy.hash,
        model="digits",
        from_version="1",
        to_version="2",
        digest="sha256:00",
        before=ROUTE,
        current=ROUTE,
        actor="ada",
        begun_ms=1,
        phase="step",
        holds=(Hold(kind="stale", reason="no reports", since_ms=3),),
        approvals=(Approval(actor="bob", at_ms=2, percent=50, digest="d", policy="p"),),
        history=(Decision(at_ms=1, action="begin", phase="shadow", percent=0, reason=""),),
    )


def test_a_stored_rollout_is_read_again() -> None:
    """JSON holds all of it, the route before included."""
    rollout = a_rollout()

    assert decode_rollout(encode_rollout(rollout)) == rollout


def test_keys_of_a_newer_release_are_left_alone() -> None:
    """A key that this release does not know is no reason to lose a rollout; another format is."""
    plain = msgspec.json.decode(encode_rollout(a_rollout()))

    assert decode_rollout(msgspec.json.encode(plain | {"mood": "good"})) == a_rollout()
    with pytest.raises(ConfigError, match="rollout digits-1 has format 2, this release knows 1"):
        decode_rollout(msgspec.json.encode(plain | {"format": FORMAT + 1}))
    with pytest.raises(ConfigError, match="a stored rollout cannot be read"):
        decode_rollout(b"{}")
