"""What KEDA is told in ``deploy/kubernetes`` is what workers do: groups, topics, queues, logins, times."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from inferfleet.config import Config
from inferfleet.naming import retry_group, retry_sources
from tests.support.manifest_pods import Secrets, broker_of, make_secrets, parse_call, pods, routes_of
from tests.support.manifests import Manifest, Rendered, render

LIVES = 5
"""A request that kills its process is answered in this life of it, docs/architecture.md."""


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    """The Secrets that the page's commands make."""
    return make_secrets(tmp_path_factory.mktemp("secrets"))


def scaled(rendered: Rendered) -> Manifest:
    """Return what KEDA is told to scale."""
    (found,) = rendered.of("ScaledObject", "ScaledJob")
    return dict(found["spec"])


def worker_of(overlay: str, secrets: Secrets, folder: Path) -> Config:
    (pod,) = [each for each in pods(overlay, secrets, folder) if each.workload.name == "worker"]
    return pod.config


def asked_by_kafka(spec: Manifest) -> set[tuple[str, str]]:
    """Return the group and topic of every Kafka trigger."""
    return {(each["metadata"]["consumerGroup"], each["metadata"]["topic"]) for each in spec["triggers"]}


@pytest.mark.parametrize("overlay", ["overlays/kafka-keda", "overlays/job"])
def test_keda_asks_for_the_group_that_workers_join(overlay: str, secrets: Secrets, tmp_path: Path) -> None:
    """Group, topics, address, login, first position are the worker's own; a job's retries count too."""
    rendered = render(overlay)
    spec, config = scaled(rendered), worker_of(overlay, secrets, tmp_path)
    mine = [route for route in routes_of(rendered) if route.pool == config.worker.pool]
    wanted = {(config.group, route.source.name) for route in mine}
    if overlay.endswith("job"):
        again = retry_group(config, config.worker.pool)
        wanted |= {(again, topic) for route in mine for topic in retry_sources(config, route)}
    assert asked_by_kafka(spec) == wanted
    for trigger in spec["triggers"]:
        metadata = trigger["metadata"]
        assert metadata["bootstrapServers"] == config.kafka.bootstrap_servers
        assert metadata["offsetResetPolicy"] == config.kafka.start
        assert config.kafka.client["security.protocol"] == "SASL_SSL"
        assert metadata["tls"] == "enable"
        assert metadata["sasl"] == config.kafka.client["sasl.mechanism"].lower().replace("-sha-", "_sha")


@pytest.mark.parametrize("overlay", ["overlays/kafka-keda", "overlays/rabbitmq-keda", "overlays/job"])
def test_what_keda_logs_in_with_is_made(overlay: str, secrets: Secrets) -> None:
    """Each trigger's login stands in the overlay, and names keys that the page's command makes."""
    rendered = render(overlay)
    logins = {each["metadata"]["name"]: each["spec"] for each in rendered.of("TriggerAuthentication")}
    for trigger in scaled(rendered)["triggers"]:
        for each in logins[trigger["authenticationRef"]["name"]]["secretTargetRef"]:
            assert each["key"] in secrets[broker_of(overlay)][each["name"]]


def test_keda_looks_at_the_queue(secrets: Secrets, tmp_path: Path) -> None:
    """The queue is the route's source; what one worker prefetches alone is no reason for a second one."""
    rendered = render("overlays/rabbitmq-keda")
    config = worker_of("overlays/rabbitmq-keda", secrets, tmp_path)
    triggers = {each["metadata"]["queueName"]: each["metadata"] for each in scaled(rendered)["triggers"]}
    routes = routes_of(rendered)
    assert triggers.keys() == {route.source.name for route in routes}
    for route in routes:
        prefetch = config.batching.max_batch_size * 3 * len(route.versions)
        assert float(triggers[route.source.name]["value"]) > prefetch
    told = urlsplit(secrets["rabbitmq"]["keda"]["rabbitmq-host"].decode())
    assert told.scheme == triggers["digits.requests"]["protocol"] == "http"
    assert told.path == urlsplit(config.rabbitmq.url).path


@pytest.mark.parametrize("overlay", ["overlays/kafka-keda", "overlays/rabbitmq-keda"])
def test_scaling_in_waits_for_drains(overlay: str, secrets: Secrets, tmp_path: Path) -> None:
    """One worker leaves at a time, has drained before the next is told, and none leaves for a short lull."""
    spec, config = scaled(render(overlay)), worker_of(overlay, secrets, tmp_path)
    down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert [each["value"] for each in down["policies"]] == [1]
    assert all(each["periodSeconds"] > config.worker.drain_timeout_s for each in down["policies"])
    assert down["stabilizationWindowSeconds"] >= 10 * config.worker.drain_timeout_s
    assert spec["cooldownPeriod"] > config.worker.drain_timeout_s


def test_a_job_lives_long_enough(secrets: Secrets, tmp_path: Path) -> None:
    """It outlasts its retries and a look of KEDA, and is started often enough to find what kills it."""
    spec, config = scaled(render("overlays/job")), worker_of("overlays/job", secrets, tmp_path)
    job = spec["jobTargetRef"]
    options = parse_call(job["template"]["spec"]["containers"][0]["args"])
    assert options["until_idle"] >= spec["pollingInterval"]
    assert job["activeDeadlineSeconds"] > options["wait_s"] + sum(config.retry.delays_ms) / 1000 * 2
    assert job["backoffLimit"] >= LIVES
    assert job["template"]["spec"]["restartPolicy"] == "OnFailure"
