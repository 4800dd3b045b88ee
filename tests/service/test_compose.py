"""``deploy/compose.yaml``: what it promises by its text, and the whole of it run for real."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferfleet import config as settings_of
from inferfleet.demo import digits, texts
from inferfleet.models.repository import Repository
from inferfleet.routes import load_routes
from inferfleet.worker.lifecycle import LEAVE_S
from tests.support import containers
from tests.support.compose import FILE, REPOSITORY
from tests.support.compose_check import REQUESTS, check, main, open_compose
from tests.support.programs import MissingServerError

FOLDER = FILE.with_name("compose")
TREE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = TREE["services"]
OURS = {name: each for name, each in SERVICES.items() if each["image"].startswith("inferfleet/")}
ONCE = {"secrets", "models", "setup", "setup-rabbitmq", "setup-gpu"}
SAID_S = re.compile(r"(\d+)s")


def seconds(text: str) -> int:
    """Return a duration such as ``30s``."""
    found = SAID_S.fullmatch(text)
    assert found is not None, text
    return int(found[1])


def test_images_are_pinned_and_our_own_are_built_here() -> None:
    """Nobody gets ``latest``, or a registry to guess; ours are built from targets of their names."""
    for name, service in SERVICES.items():
        image, _, tag = service["image"].rpartition(":")
        assert image, name
        assert re.search(r"\d+\.\d+", tag), f"{name}: {service['image']}"
        assert name in OURS or image.startswith("docker.io/"), name
    built = [
        (each["build"]["target"], each["image"].split(":")[0]) for each in OURS.values() if "build" in each
    ]
    # Each once: builds of one name beside each other may get into each other's way.
    assert sorted(built) == [
        (name, f"inferfleet/{name}") for name in ("coordinator", "demo", "worker-onnx", "worker-torch")
    ]


def test_every_worker_is_found_by_prometheus() -> None:
    """It asks for the name ``worker``: those of profiles answer to it as well."""
    workers = {name for name in SERVICES if name.startswith("worker")}
    named = {
        name
        for name in workers
        if "worker" in SERVICES[name].get("networks", {}).get("default", {}).get("aliases", ())
    }
    assert named | {"worker"} == workers


def test_nothing_is_published_beyond_loopback() -> None:
    """Every port names 127.0.0.1."""
    ports = [(name, port) for name, each in SERVICES.items() for port in each.get("ports", ())]
    assert ports
    assert [(name, port) for name, port in ports if not port.startswith("127.0.0.1:")] == []


def test_a_drain_is_never_cut_short_by_the_grace_period() -> None:
    """Docker kills after the grace period: it is above ``drain_timeout_s``, leaving included."""
    settings = tomllib.loads((FOLDER / "fleet.toml").read_text())
    workers = [each for name, each in OURS.items() if name.startswith("worker")]
    assert len(workers) == 3
    for service in workers:
        assert seconds(service["stop_grace_period"]) >= settings["worker"]["drain_timeout_s"] + LEAVE_S


def test_whatever_stays_up_says_how_it_is() -> None:
    """Servers and workers have health checks, asked often only at the start; what runs once needs none."""
    for name, service in SERVICES.items():
        health = service.get("healthcheck", {})
        if name in ONCE | {"traffic", "load"}:
            assert health.get("disable"), name
        else:
            assert health["test"], name
            assert seconds(health["start_interval"]) < seconds(health["interval"]), name


def test_containers_may_do_little() -> None:
    """No capability, no way to new ones; ours have a read-only root, too."""
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert "no-new-privileges:true" in service["security_opt"], name
    for name, service in OURS.items():
        assert service["read_only"], name
        assert service["tmpfs"] == ["/tmp"], name


def test_profiles_add_and_the_rest_needs_none() -> None:
    """What a person gets without a profile, and what each adds."""
    by_profile: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        for profile in service.get("profiles", [""]):
            by_profile.setdefault(profile, set()).add(name)
    assert by_profile == {
        "": {
            "secrets", "models", "setup", "kafka", "valkey", "coordinator", "worker", "traffic",
            "prometheus", "grafana",
        },
        "load": {"load"},
        "rabbitmq": {"rabbitmq", "setup-rabbitmq", "worker-rabbitmq"},
        "gpu": {"setup-gpu", "worker-gpu"},
    }  # fmt: skip


def test_the_files_that_are_mounted_are_sound() -> None:
    """Settings and routes load; every route's pool has a worker; volumes that are named exist."""
    for name in ("fleet.toml", "host.toml"):
        loaded = settings_of.load(FOLDER / name, {})
        settings_of.check_supported(loaded)
    pools = {"default"} | {
        each["environment"]["INFERFLEET__WORKER__POOL"]
        for each in OURS.values()
        if "INFERFLEET__WORKER__POOL" in each.get("environment", {})
    }
    files = sorted(FOLDER.glob("routes*.toml"))
    assert len(files) == 4
    for file in files:
        assert {route.pool for route in load_routes(file, "inferfleet").routes} <= pools, file
    for name, service in SERVICES.items():
        for volume in service.get("volumes", ()):
            source, _, target = volume.partition(":")
            if source.startswith("./"):
                assert (FILE.parent / source).exists(), f"{name}: {volume}"
            elif target:
                assert source in TREE["volumes"], f"{name}: {volume}"


def test_a_rollout_can_start_from_the_route_that_the_page_applies() -> None:
    """``routes.one.toml`` changes nothing of ``digits`` but its versions: the second alone answers."""
    (one,) = load_routes(FOLDER / "routes.one.toml", "inferfleet").routes
    every = load_routes(FOLDER / "routes.toml", "inferfleet").routes
    (first,) = [each for each in every if each.name == one.name]
    assert [each.version for each in one.variants] == ["2"]
    assert one.name == digits.MODEL
    assert digits.BROKEN not in {each.version for each in (*one.variants, *first.variants)}
    assert (one.source, one.results, one.model) == (first.source, first.results, first.model)


def test_the_text_model_is_trusted_by_the_bytes_that_it_has(tmp_path: Path) -> None:
    """The digest in the settings is that of the handler and the network as they are now."""
    repository = Repository(tmp_path)
    added = repository.add(texts.MODEL, "1", texts.model_files(), settings=texts.SETTINGS)
    assert (
        repository.trust_entry(added)
        in tomllib.loads((FOLDER / "fleet.toml").read_text())["models"]["trusted"]
    )


def test_the_scripts_are_plain_shell() -> None:
    """Each parses in the system's own shell."""
    scripts = sorted(FOLDER.glob("*.sh"))
    assert len(scripts) == 3
    for script in scripts:
        subprocess.run(["sh", "-n", str(script)], check=True)
    assert (REPOSITORY / "scripts" / "compose-check").exists()


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--hlep", 2)])
def test_the_check_starts_nothing_for_a_question(word: str, code: int) -> None:
    """Help is printed, and a word that means nothing refused, before any container runs."""
    with pytest.raises(SystemExit) as ended:
        main([word])
    assert ended.value.code == code


@pytest.fixture(scope="module")
def said() -> Iterator[list[str]]:
    """Lines of the check, printed where the test fails."""
    lines: list[str] = []
    yield lines
    print("\n".join(lines))


@pytest.mark.service
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_whole_fleet_keeps_its_promises_in_containers(said: list[str]) -> None:
    """10,000 requests through a kill, four workers, two again and a changed route: none lost, none wrong."""
    try:
        containers.usable_engine(said.append)
    except MissingServerError as error:
        pytest.skip(f"no container can be run here: {error}")
    report = check(open_compose(said.append), said.append)

    assert report.problems == []
    assert report.answered == REQUESTS
