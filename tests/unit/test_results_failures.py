"""What an error from Redis means: which wait for the server, which for a person, which change the server."""

from __future__ import annotations

import pytest
from redis import exceptions

from inferfleet.results.failures import (
    BUSY,
    DENIED,
    FULL,
    LOADING,
    MOVING,
    UNEXPECTED,
    UNREACHABLE,
    Trouble,
    diagnose,
)


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (exceptions.ConnectionError("refused"), UNREACHABLE),
        (exceptions.TimeoutError("no answer"), UNREACHABLE),
        (BrokenPipeError(), UNREACHABLE),
        (exceptions.BusyLoadingError("Redis is loading"), LOADING),
        (exceptions.ReadOnlyError("You can't write"), MOVING),
        (exceptions.TryAgainError("later"), MOVING),
        (exceptions.ClusterDownError("down"), MOVING),
        (exceptions.MasterDownError("down"), MOVING),
        (exceptions.SlotNotCoveredError("slot 1"), MOVING),
        (exceptions.RedisClusterException("cannot be connected"), UNREACHABLE),
        (exceptions.OutOfMemoryError("full"), FULL),
        (exceptions.ResponseError("MISCONF Redis is configured to save RDB snapshots"), FULL),
        (exceptions.ResponseError("NOREPLICAS Not enough good replicas"), FULL),
        (exceptions.ResponseError("Error running script: @user_script: 7: -OOM command not allowed"), FULL),
        (exceptions.ResponseError("BUSY Redis is busy running a script"), BUSY),
        (exceptions.NoPermissionError("no"), DENIED),
        (exceptions.AuthenticationError("wrong"), DENIED),
        (exceptions.ResponseError("WRONGTYPE Operation against a key holding the wrong kind"), DENIED),
        (exceptions.ResponseError("ACL failure in script: User u has no permissions"), DENIED),
        (exceptions.ResponseError("ERR The user executing the script can't run this command"), DENIED),
        (exceptions.ResponseError("ERR unknown command 'EVALSHA'"), UNEXPECTED),
        (KeyError("a fault of ours"), UNEXPECTED),
    ],
)
def test_every_error_has_one_meaning(error: Exception, trouble: Trouble) -> None:
    """Codes are found by class, and in the text where a script's error is wrapped."""
    assert diagnose(error) is trouble


def test_a_dead_or_wrong_server_is_resolved_anew_and_a_full_one_is_kept() -> None:
    """Reconnecting helps against failover and rotated passwords, not against a full server."""
    assert UNREACHABLE.reconnect
    assert MOVING.reconnect
    assert DENIED.reconnect
    assert not FULL.reconnect
    assert not LOADING.reconnect
