"""Real coordinator replicas over a real Redis: who leads, who takes over, what is served without it."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from inferfleet.coordinator.leader import LEASE_S
from inferfleet.coordinator.process import STOP_S
from tests.support.certificates import write_certificates
from tests.support.coordinators import ROUTE, ControlPlane, Coordinator
from tests.support.fleet import COMMAND
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.service
PATIENCE_S = 60.0
TWO = ROUTE | {"version": "2"}


@pytest.fixture
def plane(tmp_path: Path, redis_server: RedisServer) -> ControlPlane:
    return ControlPlane(tmp_path, redis_server.url)


@pytest.fixture
def pair(plane: ControlPlane) -> Iterator[tuple[Coordinator, Coordinator]]:
    """Two replicas, the leading one first."""
    replicas = [plane.coordinator("a"), plane.coordinator("b")]
    with ExitStack() as stack:
        for each in replicas:
            stack.callback(each.kill)
            each.launch()
        for each in replicas:
            each.up()
        wait_until(lambda: all(each.ready for each in replicas), PATIENCE_S, "both are ready")
        leader = wait_until(
            lambda: next((each for each in replicas if each.leads), None), PATIENCE_S, "one of them leads"
        )
        other = replicas[1 - replicas.index(leader)]
        yield leader, other


def test_another_replica_takes_over_and_the_first_gives_way(
    plane: ControlPlane, pair: tuple[Coordinator, Coordinator]
) -> None:
    """SIGSTOP the leader: the other leads within a lease; SIGCONT: the first steps nothing and follows."""
    leader, other = pair
    assert not other.leads
    made = other.ask("PUT", "/v1/routes/sums", {"route": ROUTE, "reason": "first"}, if_match='"0"')
    assert made.status == 202, made
    assert leader.ask("GET", "/v1/routes/sums").headers["etag"] == '"1"'

    leader.pause()
    wait_until(lambda: other.leads, LEASE_S + PATIENCE_S, "the other leads")
    with closing(plane.reporter("w-1")) as worker:
        worker.heartbeat(plane.report("w-1", 1, "sums:1"))
        wait_until(lambda: other.ask("GET", "/v1/workers").body["workers"], PATIENCE_S, "the worker is seen")
        made = other.ask("PUT", "/v1/routes/sums", {"route": TWO}, if_match='"1"')
        assert made.body["revisions"][0]["effective_from_ms"] is None
        shown = other.ask("GET", "/v1/routes/sums").body
        assert (shown["pending"]["number"], shown["standing"]["number"]) == (2, 1)
        worker.heartbeat(plane.report("w-1", 2, "sums:1", "sums:2"))
        wait_until(
            lambda: other.ask("GET", "/v1/routes/sums").body["pending"] is None,
            PATIENCE_S,
            "the leader gives the route its time",
        )

    leader.resume()
    wait_until(lambda: leader.events("leading_ends"), PATIENCE_S, "the first says that it gave up")
    wait_until(lambda: leader.ready and not leader.leads, PATIENCE_S, "the first follows")
    assert other.leads
    logs = [each.ask("GET", "/v1/routes/sums/revisions").body["revisions"] for each in pair]
    assert logs[0] == logs[1]
    assert [(each["number"], each["action"]) for each in logs[0]] == [
        (3, "activate"),
        (2, "apply"),
        (1, "apply"),
    ]
    audit = leader.ask("GET", "/v1/audit").body["entries"]
    assert [(each["actor"], each["action"]) for each in audit][-1] == ("coordinator", "activate")
    assert other.events("leading_begins")


def test_a_replica_that_stops_in_order_leaves_at_once(
    plane: ControlPlane, pair: tuple[Coordinator, Coordinator]
) -> None:
    """It exits 0 and gives the lease back; the other needs not wait for it to run out."""
    leader, other = pair
    assert leader.end() == 0
    wait_until(lambda: other.leads, PATIENCE_S, "the other leads")
    assert [event["reason"] for event in leader.events("leading_ends")] == ["this replica stops"]
    assert leader.events("coordinator_stopped")
    assert other.end() == 0
    with closing(plane.store()) as store:
        assert store.lead("somebody else", 1000) is not None


def test_without_redis_it_stays_and_says_so(tmp_path: Path, data_folder: Path) -> None:
    """Reads are answered 503 in the shape of every error; it is ready again when Redis is back."""
    with RedisServer(data_folder) as redis, ExitStack() as stack:
        replica = ControlPlane(tmp_path, redis.url).coordinator("a")
        stack.callback(replica.kill)
        replica.launch().up()
        wait_until(lambda: replica.ready and replica.leads, PATIENCE_S, "it leads")
        assert replica.ask("PUT", "/v1/routes/sums", {"route": ROUTE}, if_match='"0"').status == 202

        redis.pause()
        wait_until(lambda: not replica.ready, PATIENCE_S, "it is not ready")
        refused = replica.ask("GET", "/v1/routes")
        assert (refused.status, refused.body["code"], refused.body["retryable"]) == (503, "E_CONTROL", True)
        assert str(redis.port) not in refused.body["error"]
        assert f"redis at {redis.url}" in str(replica.admin("/readyz").body["reasons"])
        assert replica.admin("/healthz").status == 200
        assert "inferfleet_coordinator_store_up 0.0" in str(replica.admin("/metrics").body)
        assert 'path="/v1/routes",status="503"' in str(replica.admin("/metrics").body)
        wait_until(lambda: not replica.leads, PATIENCE_S, "it does not lead any more")

        redis.resume()
        wait_until(lambda: replica.ready and replica.leads, PATIENCE_S, "it leads again")
        assert [each["name"] for each in replica.ask("GET", "/v1/routes").body["routes"]] == ["sums"]
        assert replica.events("control_store_away")
        assert replica.events("control_store_answers")


def test_it_starts_and_stops_while_redis_is_away(tmp_path: Path, data_folder: Path) -> None:
    """It takes part as soon as there is one, and a stop waits for no answer that does not come."""
    redis = RedisServer(data_folder)
    replica = ControlPlane(tmp_path, redis.url).coordinator("a")
    with ExitStack() as stack:
        stack.callback(replica.kill)
        replica.launch().up()
        assert not replica.ready
        assert replica.ask("GET", "/v1/workers").status == 503
        stack.enter_context(redis)
        wait_until(lambda: replica.ready and replica.leads, PATIENCE_S, "it leads")
        redis.pause()
        wait_until(lambda: not replica.ready, PATIENCE_S, "it is not ready")
        assert replica.end(STOP_S + PATIENCE_S) == 0
        redis.resume()


def test_tls_and_tokens(plane: ControlPlane) -> None:
    """With a certificate it speaks TLS alone; a token that was made while it runs is known at once."""
    certificates = write_certificates(plane.folder / "tls")
    tokens = plane.folder / "tokens"
    tokens.touch(mode=0o600)
    settings = {
        "INFERFLEET__COORDINATOR__ADDRESS": "0.0.0.0:0",
        "INFERFLEET__COORDINATOR__TLS_CERT": "tls/chain.pem",
        "INFERFLEET__COORDINATOR__TLS_KEY": "tls/key.pem",
        "INFERFLEET__COORDINATOR__TOKEN_FILE": "tokens",
    }
    replica = plane.coordinator("a", **settings)
    replica.tls = ssl.create_default_context(cafile=str(certificates.authority))
    with ExitStack() as stack:
        stack.callback(replica.kill)
        replica.launch()
        replica.wait_ready(lambda: bool(replica.events("coordinator_started")), PATIENCE_S)
        port = replica.url.rpartition(":")[2]
        replica.at = f"https://localhost:{port}"
        wait_until(lambda: replica.ask("GET", "/").status == 200, PATIENCE_S, "it serves")
        assert replica.ask("GET", "/v1/routes").status == 401

        words = [*COMMAND, "coordinator", "token", "alice", "--role", "viewer", "--config", str(plane.config)]
        made = subprocess.run(
            words, env=plane.environment(settings), capture_output=True, text=True, check=True, timeout=60
        )
        bearer = {"authorization": f"Bearer {made.stdout.strip()}"}
        wait_until(
            lambda: replica.ask("GET", "/v1/routes", **bearer).status == 200, PATIENCE_S, "it is known"
        )
        refused = replica.ask("PUT", "/v1/routes/sums", {"route": ROUTE}, if_match='"0"', **bearer)
        assert (refused.status, refused.body["code"]) == (403, "E_FORBIDDEN")
        assert made.stdout.strip() not in replica.log.read_text()

        replica.at = f"http://localhost:{port}"
        assert replica.ask("GET", "/").status == 0
        replica.at = f"https://localhost:{port}"
        replica.tls = ssl.create_default_context()
        assert replica.ask("GET", "/").status == 0, "a certificate that nobody trusts"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ADDRESS": "0.0.0.0:0"}, "tls_cert and tls_key"),
        ({"ADDRESS": "0.0.0.0:0", "TLS": "terminated-upstream"}, "token_file"),
        ({"TOKEN_FILE": "none"}, "cannot be read"),
    ],
)
def test_it_does_not_start_where_it_may_not_be_offered(
    plane: ControlPlane, settings: dict[str, str], said: str
) -> None:
    """One line, exit code 1, and nothing was bound."""
    env = plane.environment({f"INFERFLEET__COORDINATOR__{key}": value for key, value in settings.items()})
    done = subprocess.run(
        [*COMMAND, "coordinator", "--config", str(plane.config)],
        env=env, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
