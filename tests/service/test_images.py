"""The images of deploy/Dockerfile, built and run: how large, as whom, with a root that is read only."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from inferfleet import __version__
from tests.support import containers
from tests.support.containers import Engine
from tests.support.programs import MissingServerError
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.slow, pytest.mark.timeout(1200)]

MOST_MB = {"worker-onnx": 300, "coordinator": 120}
"""What the layers over the Python base may hold, in millions of bytes."""
LOCKED_DOWN = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


@pytest.fixture(scope="module")
def engine() -> Engine:
    """An engine, and both images built by it."""
    try:
        found = containers.usable_engine(print)
    except MissingServerError as error:
        pytest.skip(f"no container can be run here: {error}")
    for target in MOST_MB:
        containers.build(found, target)
    return found


def inspected(engine: Engine, target: str) -> dict[str, Any]:
    """Return what the engine knows of an image."""
    (found,) = json.loads(engine.run("image", "inspect", containers.image_name(target)))
    return dict(found)


@pytest.mark.parametrize("target", MOST_MB)
def test_an_image_is_small_named_and_nobody_special(
    engine: Engine, target: str, record_property: pytest.RecordProperty
) -> None:
    """Size, user, labels, entry point, and where state is kept."""
    megabytes = containers.added(engine, target) / 1e6
    record_property(f"image {target}", f"{megabytes:.0f} MB of our own layers")
    assert megabytes <= MOST_MB[target]
    config = inspected(engine, target)["Config"]
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert config["Entrypoint"] == ["inferfleet"]
    assert list(config["Volumes"]) == ["/var/lib/inferfleet"]


@pytest.mark.parametrize("target", MOST_MB)
def test_an_image_runs_without_rights_and_without_a_disk(engine: Engine, target: str) -> None:
    """The root is read only, no capability is left, and the user cannot write outside of its places."""
    image = containers.image_name(target)
    assert __version__ in engine.run("run", "--rm", *LOCKED_DOWN, image, "--version")
    probe = "touch /etc/x 2>/dev/null || touch /opt/x 2>/dev/null || touch /var/lib/inferfleet/x && id -u"
    said = engine.run("run", "--rm", *LOCKED_DOWN, "--entrypoint", "sh", image, "-c", probe)
    assert said.split() == ["10001"]


@pytest.fixture
def waiting_worker(engine: Engine) -> Iterator[str]:
    """A worker whose Kafka never answers."""
    environment = ("-e", "INFERFLEET__KAFKA__BOOTSTRAP_SERVERS=127.0.0.1:1")
    routes = 'name = "a"\nsource = "kafka:a"\nresults = ["kafka:b"]\nmodel = "m"\nversion = "1"'
    files = f"cd /tmp; echo >fleet.toml; echo '[[route]]\n{routes}' >routes.toml"
    settings = "-c", f"{files}; exec inferfleet worker --config /tmp/fleet.toml --wait 300"
    image = containers.image_name("worker-onnx")
    words = ("run", "-d", *LOCKED_DOWN, *environment, "--entrypoint", "sh", image, *settings)
    container = engine.run(*words).strip()
    yield container
    engine.run("rm", "-f", "-v", container)


def test_a_worker_that_waits_ends_when_it_is_told(engine: Engine, waiting_worker: str) -> None:
    """It is process 1, where a signal without a handler is no signal."""

    def waits() -> bool:
        done = subprocess.run(
            [*engine.command, "logs", waiting_worker], capture_output=True, text=True, check=False
        )
        return "waiting" in done.stdout + done.stderr

    wait_until(waits, 60, "the worker says what it waits for", every_s=0.5)
    engine.run("stop", "--time", "30", waiting_worker)
    code = int(engine.run("inspect", "--format", "{{.State.ExitCode}}", waiting_worker))
    assert code == 0, "it ends by itself, having taken nothing"
