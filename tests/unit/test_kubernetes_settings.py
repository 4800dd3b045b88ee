"""``deploy/kubernetes`` and the code agree: settings load, probes are answered, times leave room."""

from __future__ import annotations

import json
import re
import shutil
import time
import tomllib
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from inferfleet.coordinator.exposure import expose
from inferfleet.coordinator.process import STOP_S
from inferfleet.telemetry.admin import AdminServer, Health
from tests.support.manifest_pods import (
    PAGE,
    SECRETS,
    Secrets,
    broker_of,
    commands,
    make_secrets,
    parse_call,
    pods,
)
from tests.support.manifests import (
    FOLDER,
    NAMESPACE,
    OVERLAYS,
    Rendered,
    Workload,
    render,
    render_folder,
    selects,
)
from tests.support.programs import REPOSITORY

PREFETCH = 64 * 1024 * 1024
"""What a worker's Kafka client fetches ahead at most, docs/how-to/operate.md."""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which somebody follows the page."""
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="module")
def secrets(reader: Path) -> Secrets:
    """The Secrets that the page's commands make."""
    return make_secrets(reader)


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def seconds_of_stop(workload: Workload) -> float:
    hook = workload.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {"seconds": 0})
    return float(workload.pod["terminationGracePeriodSeconds"]) - float(hook["seconds"])


def test_the_pages_secrets_are_for_their_owner_alone(secrets: Secrets, reader: Path) -> None:
    """Whoever follows the page leaves no token that others may read, or that git would take."""
    place = reader / "secrets"
    modes = {name: (place / name).stat().st_mode & 0o777 for name in (".", "tokens", "alice.token")}
    assert modes == {".": 0o700, "tokens": 0o600, "alice.token": 0o600}
    assert secrets["kafka"]["coordinator"]["tokens"] == (place / "tokens").read_bytes()
    assert "secrets/" in (REPOSITORY / ".gitignore").read_text().splitlines()


def test_settings_load_and_every_path_is_mounted(overlay: str, secrets: Secrets, tmp_path: Path) -> None:
    """The real loader takes each pod's settings with the Secrets of the page, and what they name is there."""
    for pod in pods(overlay, secrets, tmp_path):
        config, mounted = pod.config, pod.workload.mounted()
        assert config.fleet.name == NAMESPACE
        assert config.models.repository in mounted
        authority = pod.root / SECRETS.lstrip("/") / "ca.crt"
        assert authority.read_text().startswith("-----BEGIN CERTIFICATE")
        assert f"ssl_ca_certs={authority}" in config.redis.url
        assert config.redis.username.startswith("inferfleet-")
        assert config.redis.password.startswith("the content of redis-")
        if broker_of(overlay) == "kafka":
            assert config.kafka.client["sasl.username"].startswith("inferfleet-")
            assert config.kafka.client["sasl.password"].startswith("the content of kafka-")
            assert config.kafka.client["ssl.ca.location"] == str(authority)
        elif pod.workload.name != "coordinator":
            assert config.rabbitmq.password.startswith("the content of rabbitmq-")
            assert config.rabbitmq.ca_file == str(authority)
        if pod.workload.labels["app.kubernetes.io/component"] == "worker":
            assert "emptyDir" in mounted[config.worker.state]
            assert config.worker.pool == pod.workload.labels["inferfleet/pool"]
            assert (
                pod.workload.environment.get("INFERFLEET__WORKER__DEVICE") or "auto"
            ) == config.worker.device


def test_the_coordinator_may_be_offered(secrets: Secrets, tmp_path: Path) -> None:
    """Its certificate and its tokens load, as on any address that is not loopback; it knows its names."""
    for overlay in OVERLAYS:
        (pod,) = [
            each
            for each in pods(overlay, secrets, tmp_path / overlay.replace("/", "-"))
            if each.workload.name == "coordinator"
        ]
        port = int(pod.config.coordinator.address.rpartition(":")[2])
        assert pod.workload.ports["api"] == port
        anywhere = msgspec.structs.replace(pod.config.coordinator, address="0.0.0.0:0")
        exposure = expose(anywhere, pod.config.base, time.time)
        exposure.listener.close()
        assert exposure.certificate
        assert exposure.tokens is not None
        name = render(overlay).of("Service")[0]["metadata"]["name"]
        assert {name, f"{name}.{NAMESPACE}", f"{name}.{NAMESPACE}.svc"} <= exposure.hosts


def test_command_lines_parse(overlay: str) -> None:
    """What a container runs is a verb that exists, with options that it has."""
    for workload in render(overlay).workloads:
        if "command" in workload.container:
            assert workload.name == "toolbox"
            continue
        parse_call(workload.container["args"])


def test_probes_and_scrapes_ask_what_the_process_answers(
    overlay: str, secrets: Secrets, tmp_path: Path
) -> None:
    """Ports are those of the settings; every path is one that an admin address has."""
    paths: set[str] = set()
    for pod in pods(overlay, secrets, tmp_path):
        if pod.workload.name == "toolbox":
            continue
        section = pod.config.coordinator if pod.workload.name == "coordinator" else pod.config.worker
        host, _, port = section.admin_address.rpartition(":")
        assert (host, pod.workload.ports["metrics"]) == ("0.0.0.0", int(port))
        probes = [pod.workload.container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
        assert [each["httpGet"]["port"] for each in probes] == ["metrics"] * 3
        asked = [each["httpGet"]["path"] for each in probes]
        assert asked == ["/healthz", "/readyz", "/healthz"]
        paths.update(asked)
    for monitor in render(overlay).of("PodMonitor"):
        paths.update(each["path"] for each in monitor["spec"]["podMetricsEndpoints"])
    with AdminServer("127.0.0.1:0", CollectorRegistry(), lambda: Health(True, True)) as admin:
        for path in sorted(paths):
            with urllib.request.urlopen(f"http://{admin.address}{path}", timeout=10) as answer:
                assert answer.status == 200


def test_times_leave_room_for_each_other(overlay: str, secrets: Secrets, tmp_path: Path) -> None:
    """Grace is above the drain, a start's patience above ``--wait``, a rollout's above both."""
    for pod in pods(overlay, secrets, tmp_path):
        workload, container = pod.workload, pod.workload.container
        if workload.name == "coordinator":
            assert seconds_of_stop(workload) > STOP_S
        elif workload.name != "toolbox":
            assert seconds_of_stop(workload) > pod.config.worker.drain_timeout_s
            probe = container["startupProbe"]
            patience = probe["periodSeconds"] * probe["failureThreshold"]
            assert patience > parse_call(container["args"])["wait_s"]
            if "progressDeadlineSeconds" in (spec := workload.manifest["spec"]):
                assert spec["progressDeadlineSeconds"] > patience + spec["minReadySeconds"]


BYTES = {"Mi": 1 << 20, "Gi": 1 << 30}


def test_resources_hold_what_a_worker_may_hold(overlay: str, secrets: Secrets, tmp_path: Path) -> None:
    """Memory has room for twice the bytes in flight and the prefetch; a core is left for the loop."""
    for pod in pods(overlay, secrets, tmp_path):
        limits = pod.workload.container["resources"]["limits"]
        requests = pod.workload.container["resources"]["requests"]
        assert limits.keys() >= {"cpu", "memory", "ephemeral-storage"} == requests.keys()
        if pod.workload.labels["app.kubernetes.io/component"] == "worker":
            memory = int(limits["memory"][:-2]) * BYTES[limits["memory"][-2:]]
            assert memory > 2 * pod.config.limits.in_flight_bytes + PREFETCH + (512 << 20)
            assert int(limits["cpu"]) > pod.config.worker.threads > 0


def test_what_the_settings_name_can_be_reached(overlay: str, secrets: Secrets, tmp_path: Path) -> None:
    """For each server that a process speaks to, a policy opens its namespace and port, and DNS."""
    rendered = render(overlay)
    for pod in pods(overlay, secrets, tmp_path):
        config = pod.config
        servers = [urlsplit(config.redis.url).netloc.rpartition("@")[2]]
        if broker_of(overlay) == "kafka":
            servers += config.kafka.bootstrap_servers.split(",")
        elif pod.workload.name != "coordinator":
            servers += [urlsplit(each).netloc for each in config.rabbitmq.url.split(",")]
        opened = opened_to(rendered, pod.workload)
        for server in servers:
            host, _, port = server.partition(":")
            assert (host.split(".")[1], int(port)) in opened, (pod.workload.name, server)
        assert ("kube-system", 53) in opened
        assert len(opened) == len(servers) + 1, "nothing else is open"


def opened_to(rendered: Rendered, workload: Workload) -> set[tuple[str, int]]:
    """Return the namespaces and ports that policies let a workload's pods reach."""
    found = set()
    for policy in rendered.of("NetworkPolicy"):
        spec = policy["spec"]
        if selects(spec["podSelector"], workload.labels):
            for rule in spec.get("egress", ()):
                for to in rule["to"]:
                    name = to["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
                    found |= {(name, port["port"]) for port in rule["ports"]}
    return found


def test_the_page_makes_a_fleet_of_ones_own(tmp_path: Path) -> None:
    """Its kustomization renders with the files that it says to copy, and names what it says to change."""
    shutil.copytree(FOLDER, tmp_path / "deploy" / "kubernetes")
    (tmp_path / "fleet").mkdir()
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    file = tmp_path / "fleet" / "kustomization.yaml"
    file.write_text(block)
    for name in ("fleet.toml", "routes.toml"):
        text = (FOLDER / "base" / name).read_text()
        (tmp_path / "fleet" / name).write_text(text + "# ours\n")
    rendered = render_folder(tmp_path / "fleet")
    images = {each.container["image"].rpartition(":")[0] for each in rendered.workloads}
    assert all(image.startswith("registry.example.com/inferfleet/") for image in images)
    worker = rendered.workload("worker")
    assert rendered.data(worker, "/etc/inferfleet")["fleet.toml"].endswith("# ours\n")
    assert len(rendered.of("ScaledObject")) == 1
    assert rendered.of("PodMonitor") == []
    file.write_text(block.replace("# components:", "components:"))
    assert len(render_folder(tmp_path / "fleet").of("PodMonitor")) == 2


def test_the_pages_commands_name_what_is_there() -> None:
    """Paths exist, objects of kubectl's lines are in the manifests, and verbs behind ``--`` parse."""
    names = {
        f"{each['kind'].lower()}/{each['metadata']['name']}" for o in OVERLAYS for each in render(o).objects
    }
    found = 0
    for words in commands():
        if words[:1] != ["kubectl"]:
            continue
        for word in words:
            if word.startswith("deploy/kubernetes/"):
                assert (REPOSITORY / word).exists(), word
            elif re.fullmatch(r"(deployment|service|deploy)/[a-z-]+", word):
                assert word.replace("deploy/", "deployment/") in names, word
        if "inferfleet" in words[4:]:
            call = words[words.index("inferfleet", 4) + 1 :]
            call = [str(PAGE) if word.endswith((".onnx", ".toml")) else word for word in call]
            assert parse_call(call) is not None
            found += 1
    assert found == 4
    for mentioned in re.findall(r"`(deploy/kubernetes/[\w/.-]+)`", PAGE.read_text()):
        assert (REPOSITORY / mentioned).exists(), mentioned


def test_overlays_share_the_settings_that_have_nothing_to_do_with_a_broker() -> None:
    """RabbitMQ's ``fleet.toml`` differs from the base's in its broker, and in nothing else."""
    ours = tomllib.loads((FOLDER / "base" / "fleet.toml").read_text())
    other = tomllib.loads((FOLDER / "overlays" / "rabbitmq-keda" / "fleet.toml").read_text())
    ours.pop("kafka")
    other.pop("rabbitmq")
    assert json.dumps(ours) == json.dumps(other)


def test_images_are_made_for_these_pods(overlay: str, secrets: Secrets, tmp_path: Path) -> None:
    """Each image has a target, runs as the pods' user, and its variables say what the settings say."""
    file = (REPOSITORY / "deploy" / "Dockerfile").read_text()
    user = re.findall(r"^USER (\d+):(\d+)$", file, re.MULTILINE)
    variables = dict(re.findall(r"\b(INFERFLEET_\w+)=(\S+)", file))
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", file, re.MULTILINE))
    for pod in pods(overlay, secrets, tmp_path):
        around = pod.workload.pod["securityContext"]
        assert (str(around["runAsUser"]), str(around["runAsGroup"])) in user
        assert pod.workload.container["image"].partition("/")[2].partition(":")[0] in targets
        said = {
            "INFERFLEET_CONFIG": pod.workload.environment["INFERFLEET_CONFIG"],
            "INFERFLEET__MODELS__REPOSITORY": pod.config.models.repository,
            "INFERFLEET__WORKER__STATE": pod.config.worker.state,
            "INFERFLEET__WORKER__ADMIN_ADDRESS": pod.config.worker.admin_address,
            "INFERFLEET__COORDINATOR__ADMIN_ADDRESS": pod.config.coordinator.admin_address,
        }
        # The environment wins over the file, so a difference would make the file a lie.
        assert {name: said.get(name) for name in variables} == variables
