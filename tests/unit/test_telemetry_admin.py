"""The admin address: probes, metrics, status and pauses, on a port that is known to be ours."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from inferfleet.errors import ConfigError
from inferfleet.telemetry.admin import AdminServer, Health, WorkerStatus, split_address


class Process:
    """A process whose health a test decides."""

    def __init__(self) -> None:
        self.state = Health(True, True)
        self.paused: dict[str, str] = {}

    def health(self) -> Health:
        return self.state


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
def server(process: Process) -> Iterator[AdminServer]:
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    status = WorkerStatus(worker="w", group="g", paused={"r": "redis is away"})
    with AdminServer(
        "127.0.0.1:0",
        registry,
        process.health,
        lambda: status,
        pause=process.paused.__setitem__,
        resume=process.paused.pop,
        serves=lambda name: name in ("digits", "files"),
    ) as running:
        yield running


def get(server: AdminServer, path: str, method: str = "GET", accept: str = "*/*") -> tuple[int, str, bytes]:
    request = urllib.request.Request(
        f"http://{server.address}{path}", method=method, headers={"Accept": accept}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, response.headers["Content-Type"], response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


def test_ready_and_live_are_told_apart(server: AdminServer, process: Process) -> None:
    """A worker that is not ready lives on, and says why; one that is not live is neither."""
    assert [get(server, path)[0] for path in ("/healthz", "/livez", "/readyz")] == [200, 200, 200]
    process.state = Health(True, False, ("loading m:1",))

    assert get(server, "/healthz")[0] == 200
    status, _, body = get(server, "/readyz")
    assert status == 503
    assert json.loads(body) == {"live": True, "ready": False, "reasons": ["loading m:1"]}
    process.state = Health(False, True)
    assert [get(server, path)[0] for path in ("/healthz", "/readyz")] == [503, 503]


def test_metrics_come_in_both_formats(server: AdminServer) -> None:
    """Plain text by default, OpenMetrics where it is asked for."""
    _, plain, text = get(server, "/metrics")
    _, open_metrics, open_text = get(server, "/metrics", accept="application/openmetrics-text; version=1.0.0")

    assert plain.startswith("text/plain")
    assert b"things_total 3.0" in text
    assert open_metrics.startswith("application/openmetrics-text")
    assert open_text.endswith(b"# EOF\n")


def test_status_is_what_the_process_says(server: AdminServer) -> None:
    """JSON of the given object."""
    status, kind, body = get(server, "/status")

    assert (status, kind) == (200, "application/json")
    assert json.loads(body)["paused"] == {"r": "redis is away"}


def test_a_strange_path_or_method_is_refused(server: AdminServer) -> None:
    """404 names the paths that exist; HEAD has no body; what is only read cannot be posted to."""
    assert get(server, "/nothing")[0] == 404
    assert "/readyz" in json.loads(get(server, "/nothing")[2])["paths"]
    assert get(server, "/healthz?verbose=1", method="HEAD")[2] == b""
    assert get(server, "/healthz", method="POST")[0] == 405
    assert get(server, "/healthz", method="DELETE")[0] == 501


def post(server: AdminServer, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, object]]:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(
        f"http://{server.address}{path}", body, {"content-type": "application/json", **given}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_a_route_is_paused_and_resumed(server: AdminServer, process: Process) -> None:
    """The reason is the body's, on one line and bounded, else it says who asked."""
    said = json.dumps({"reason": f"model is\n{'x' * 500}"}).encode()
    paused = post(server, "/routes/digits/pause", said)
    reason = f"model is {'x' * 191}"

    assert paused == (200, {"route": "digits", "paused": True, "reason": reason})
    assert process.paused == {"digits": reason}
    assert post(server, "/routes/files/pause")[1]["reason"] == "paused by 127.0.0.1"
    assert post(server, "/routes/digits/resume") == (200, {"route": "digits", "paused": False})
    assert set(process.paused) == {"files"}


def test_no_web_page_can_pause_a_route(server: AdminServer, process: Process) -> None:
    """What a page may send without being asked is refused, and so is all that a browser marks as a page's."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        status, body = post(server, "/routes/digits/pause", content_type=kind)
        assert (status, body) == (415, {"error": "content-type must be application/json"})
    assert post(server, "/routes/digits/pause", Origin="http://127.0.0.1")[0] == 403
    assert get(server, "/routes/digits/pause", method="OPTIONS")[0] == 501
    assert get(server, "/routes/digits/pause")[0] == 404
    assert process.paused == {}


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/routes/letters/pause", b"", 404, 'no route of this worker is named "letters"'),
        ("/routes/letters/resume", b"", 404, 'no route of this worker is named "letters"'),
        ("/routes/Digits/pause", b"", 404, "POST goes to /routes/NAME/pause"),
        ("/routes/digits/stop", b"", 404, "POST goes to /routes/NAME/pause"),
        ("/routes/digits/../digits/pause", b"", 404, "POST goes to /routes/NAME/pause"),
        ("/routes/digits/pause", b"no json", 400, "the body must be empty or"),
        ("/routes/digits/pause", b'{"why": "x"}', 400, "unknown field"),
        ("/routes/digits/pause", b'{"reason": 7}', 400, "Expected `str`"),
        ("/routes/digits/pause", b" " * 5000, 400, "at most 4096 bytes"),
    ],
)
def test_what_cannot_be_meant_changes_nothing(
    server: AdminServer, process: Process, path: str, body: bytes, status: int, said: str
) -> None:
    """An unknown route is 404, a body of another form 400; the answer says what is wrong."""
    code, answer = post(server, path, body)

    assert code == status
    assert said in str(answer["error"])
    assert process.paused == {}


def test_without_commands_nothing_can_be_posted(process: Process) -> None:
    """A process that cannot pause has no such paths."""
    with AdminServer("127.0.0.1:0", CollectorRegistry(), process.health) as server:
        assert post(server, "/routes/digits/pause")[0] == 404


def test_a_failing_answer_is_a_500_without_inner_names(process: Process) -> None:
    """The text of an exception stays in the log."""

    def broken() -> object:
        raise RuntimeError("canary")

    with AdminServer("127.0.0.1:0", CollectorRegistry(), process.health, broken) as server:
        status, _, body = get(server, "/status")

    assert status == 500
    assert b"canary" not in body


def test_a_taken_port_is_named_with_its_setting(server: AdminServer, process: Process) -> None:
    """The error comes from the constructor, before anything else has started."""
    with pytest.raises(
        ConfigError, match=r"\[worker\] admin_address = .* cannot be used: Address already in use"
    ):
        AdminServer(server.address, CollectorRegistry(), process.health)


def test_a_closed_server_frees_its_port(process: Process) -> None:
    """The same address can be used again at once; closing one that never started is fine."""
    first = AdminServer("127.0.0.1:0", CollectorRegistry(), process.health)
    address = first.address
    first.close()
    second = AdminServer(address, CollectorRegistry(), process.health)
    second.start()
    second.close()


@pytest.mark.parametrize("address", ["8471", ":8471", "h:", "h:x", "h:70000"])
def test_what_is_no_address_is_refused(address: str) -> None:
    """Host and port, both."""
    with pytest.raises(ConfigError, match=r"\[coordinator\] address = .* is not an address"):
        split_address(address, "[coordinator] address")


def test_addresses_of_both_families_are_split() -> None:
    """IPv6 stands in brackets."""
    assert split_address("127.0.0.1:0", "k") == ("127.0.0.1", 0)
    assert split_address("[::1]:8471", "k") == ("::1", 8471)
