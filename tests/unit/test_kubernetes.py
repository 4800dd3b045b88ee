"""``deploy/kubernetes``: what kubectl renders is what Kubernetes and the operators take, and it fits."""

from __future__ import annotations

import copy
import functools
import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support import custom_kinds, pod_security
from tests.support.manifests import (
    NAMESPACE,
    OPERATOR,
    OVERLAYS,
    Manifest,
    Rendered,
    Workload,
    render,
    render_watched,
    selects,
)
from tests.support.programs import REPOSITORY
from tools.prometheus_rules import objects

VERSIONS = ("1.31", "1.37")
"""The oldest Kubernetes that the manifests are for, and the newest that there are schemas of."""
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
UID = 10001


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    """Each kustomization in turn, with what the Prometheus operator gets."""
    return render_watched(request.param)


@pytest.fixture
def base() -> Rendered:
    return render_watched("base")


def builtin(found: Manifest) -> Iterator[Manifest]:
    """Yield what Kubernetes' own schemas judge: an object, or what an operator will make of it."""
    spec, metadata = found.get("spec", {}), {"name": found["metadata"]["name"]}
    if found["kind"] == "ScaledJob":
        yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec["jobTargetRef"]}
    elif found["kind"] == "ScaledObject":
        yield {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": metadata,
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", **spec["scaleTargetRef"]},
                "minReplicas": spec["minReplicaCount"],
                "maxReplicas": spec["maxReplicaCount"],
                "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
            },
        }
    elif found["kind"] not in custom_kinds.SCHEMAS:
        yield found


@functools.cache
def _validate(text: str, version: str) -> None:
    """Judge one object, given as JSON so that what overlays share is judged once; the schemas are large."""
    kubernetes_validate.validate(json.loads(text), version, strict=True)


def judge(found: Manifest, version: str) -> None:
    """Raise a ``ValidationError`` for what Kubernetes of this version, or an operator, would not take."""
    for each in builtin(found):
        _validate(json.dumps(each, sort_keys=True), version)
    if found["kind"] in custom_kinds.SCHEMAS:
        custom_kinds.check(found)


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_is_of_its_kinds_schema(rendered: Rendered, version: str) -> None:
    """No key is unknown to Kubernetes' schemas, or to ours of KEDA's and the operator's kinds."""
    for each in rendered.objects:
        judge(each, version)


def test_every_object_is_in_its_place(rendered: Rendered) -> None:
    """One namespace, which admits restricted pods only; no name twice; no Secret among what is committed."""
    (namespace,) = rendered.of("Namespace")
    assert namespace["metadata"]["name"] == NAMESPACE
    labels = namespace["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
    others = [each for each in rendered.objects if each is not namespace]
    assert {each["metadata"]["namespace"] for each in others} == {NAMESPACE}
    names = [(each["kind"], each["metadata"]["name"]) for each in rendered.objects]
    assert sorted(names) == sorted(set(names))
    assert rendered.of("Secret") == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "template", "spec", "terminationGracePeriod"), 40),
        ("PodDisruptionBudget", ("spec", "maxUnavailable"), [1]),
        ("ScaledObject", ("spec", "minReplicas"), 1),
        ("ScaledObject", ("spec", "triggers", 0, "metadata", "consumergroup"), "x"),
        ("ScaledObject", ("spec", "triggers", 0, "metadata", "lagThreshold"), 1000),
        ("ScaledObject", ("spec", "triggers", 0, "type"), "kafkas"),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "interval"), "15"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "duration"), "5m"),
    ],
)
def test_the_check_of_schemas_bites(kind: str, path: tuple[Any, ...], value: Any) -> None:
    """A misspelt key and a value of another type would be found."""
    changed = copy.deepcopy(render_watched("overlays/kafka-keda").of(kind)[0])
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        judge(changed, VERSIONS[0])


def test_idle_consumers_and_lagging_partitions_are_not_asked_for_together() -> None:
    """KEDA refuses a trigger that asks for both."""
    changed = copy.deepcopy(render("overlays/job").of("ScaledJob")[0])
    custom_kinds.check(changed)
    changed["spec"]["triggers"][0]["metadata"]["allowIdleConsumers"] = "true"
    with pytest.raises(jsonschema.ValidationError):
        custom_kinds.check(changed)


def test_pods_are_restricted_and_more(rendered: Rendered) -> None:
    """The profile admits every pod; besides they have our user, a read-only root, and no token."""
    for each in rendered.workloads:
        assert pod_security.violations(each.pod) == [], each.name
        around, security = each.pod["securityContext"], each.container["securityContext"]
        assert {around["runAsUser"], around["runAsGroup"], around["fsGroup"]} == {UID}
        assert security["readOnlyRootFilesystem"] is True
        assert each.pod["automountServiceAccountToken"] is False
        assert each.pod["enableServiceLinks"] is False
        account = rendered.one("ServiceAccount", each.pod["serviceAccountName"])
        assert account["automountServiceAccountToken"] is False
        assert "emptyDir" in each.mounted()["/tmp"]
        for volume in each.pod["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], volume


CONTAINER = "containers.0."
FORBIDDEN: dict[str, Any] = {
    "hostNetwork": True,
    "hostPID": True,
    "volumes.0": {"name": "root", "hostPath": {"path": "/"}},
    "securityContext.runAsNonRoot": False,
    "securityContext.runAsUser": 0,
    "securityContext.seccompProfile": {"type": "Unconfined"},
    "securityContext.sysctls": [{"name": "kernel.msgmax", "value": "1"}],
    "securityContext.appArmorProfile": {"type": "Unconfined"},
    "securityContext.seLinuxOptions": {"user": "root"},
    "securityContext": {},
    CONTAINER + "securityContext.privileged": True,
    CONTAINER + "securityContext.allowPrivilegeEscalation": True,
    CONTAINER + "securityContext.runAsNonRoot": False,
    CONTAINER + "securityContext.procMount": "Unmasked",
    CONTAINER + "securityContext.capabilities": {"drop": ["NET_RAW"]},
    CONTAINER + "securityContext.capabilities.add": ["SYS_ADMIN"],
    CONTAINER + "securityContext": {},
    CONTAINER + "ports.0.hostPort": 8471,
    CONTAINER + "livenessProbe.httpGet.host": "169.254.169.254",
}


@pytest.mark.parametrize("path", FORBIDDEN)
def test_the_check_of_pod_security_bites(base: Rendered, path: str) -> None:
    """Each rule of the profile finds what breaks it."""
    changed = copy.deepcopy(base.workload("worker").pod)
    place: Any = changed
    *steps, last = [int(step) if step.isdecimal() else step for step in path.split(".")]
    for step in steps:
        place = place[step]
    place[last] = FORBIDDEN[path]
    assert pod_security.violations(changed)


def test_selectors_find_what_they_mean(rendered: Rendered) -> None:
    """Selectors of workloads tell them apart; budgets and the Service find one, monitors all of a kind."""
    workloads = rendered.workloads
    for each in rendered.of("Deployment"):
        found = [other.name for other in workloads if selects(each["spec"]["selector"], other.labels)]
        assert found == [each["metadata"]["name"]]
        assert each["spec"]["selector"].keys() == {"matchLabels"}
    for each in rendered.of("PodDisruptionBudget"):
        found = [other.name for other in workloads if selects(each["spec"]["selector"], other.labels)]
        assert found == [each["metadata"]["name"]]
    for each in rendered.of("PodMonitor"):
        component = {"app.kubernetes.io/component": each["metadata"]["name"]}
        for other in workloads:
            assert selects(each["spec"]["selector"], other.labels) == (
                component.items() <= other.labels.items()
            )
    (service,) = rendered.of("Service")
    behind = [
        each for each in workloads if selects({"matchLabels": service["spec"]["selector"]}, each.labels)
    ]
    assert [each.name for each in behind] == ["coordinator"]
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= behind[0].ports.keys()
    for workload in workloads:
        for spread in workload.pod.get("topologySpreadConstraints", ()):
            assert selects(spread["labelSelector"], workload.labels)


def test_every_pod_that_serves_is_watched_and_guarded(rendered: Rendered) -> None:
    """Workers and coordinators are scraped where they listen; those that stay have a budget."""
    for name in ("worker", "coordinator"):
        workload = rendered.workload(name)
        monitor = rendered.one("PodMonitor", name)["spec"]
        assert [each["port"] for each in monitor["podMetricsEndpoints"]] == ["metrics"]
        assert "metrics" in workload.ports
        # The label becomes the job's name, which the rules and the dashboards look for.
        assert workload.labels[monitor["jobLabel"]] == name
        budgets = [each["metadata"]["name"] for each in rendered.of("PodDisruptionBudget")]
        assert (name in budgets) == (workload.manifest["kind"] == "Deployment")


def test_jobs_have_the_names_that_the_rules_know(base: Rendered) -> None:
    """Whatever job an alert or a recording rule names is one that a PodMonitor makes."""
    made = {each["metadata"]["name"] for each in base.of("PodMonitor")}
    rules = (REPOSITORY / "deploy" / "prometheus" / "rules").glob("*.yaml")
    named = {job for file in rules for job in re.findall(r'job="([^"]+)"', file.read_text())}
    assert named <= made | {"prometheus"}


def test_the_operator_gets_the_rules_as_they_are(base: Rendered) -> None:
    """A PrometheusRule holds what promtool has tested; the committed file is what its writer writes."""

    def spaced(groups: Any) -> Any:
        """Kustomize breaks the lines of some expressions anew."""
        return json.loads(re.sub(r"(\\n|\s)+", " ", json.dumps(groups)))

    found = {each["metadata"]["name"]: spaced(each["spec"]["groups"]) for each in base.of("PrometheusRule")}
    files = (REPOSITORY / "deploy" / "prometheus" / "rules").glob("*.yaml")
    assert found == {file.stem: spaced(yaml.safe_load(file.read_text())["groups"]) for file in files}
    written = (OPERATOR / "rules.yaml").read_text()
    assert written == objects(), "write it again: python -m tools.prometheus_rules"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_without_the_operator_nothing_asks_for_its_kinds(overlay: str) -> None:
    """A cluster without the Prometheus operator takes every overlay: only the component has its kinds."""
    kinds = {each["kind"] for each in render(overlay).objects if "monitoring" in each["apiVersion"]}
    assert kinds == set()
    added = [each for each in render_watched(overlay).objects if each not in render(overlay).objects]
    assert {each["kind"] for each in added} == {"PodMonitor", "PrometheusRule"}


def test_network_policies_close_everything_and_open_what_is_there(rendered: Rendered) -> None:
    """One policy closes all pods both ways; the others open ports that the pods they mean have."""
    closed = rendered.one("NetworkPolicy", "closed")["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in rendered.of("NetworkPolicy"):
        spec = policy["spec"]
        pods = [each for each in rendered.workloads if selects(spec["podSelector"], each.labels)]
        assert pods, policy["metadata"]["name"]
        for rule in spec.get("ingress", ()):
            assert rule["from"], "an empty list would let everybody in"
            for pod in pods:
                assert {port["port"] for port in rule["ports"]} <= pod.ports.keys()
        for rule in spec.get("egress", ()):
            assert rule["to"]
            assert all(port["port"] for port in rule["ports"])
    admin = rendered.one("NetworkPolicy", "metrics")["spec"]["ingress"]
    assert [each.keys() for rule in admin for each in rule["from"]] == [{"namespaceSelector"}]


def test_images_are_of_this_version(rendered: Rendered) -> None:
    """Every image is one of ours with the project's own version as its tag."""
    names = {"worker-onnx", "coordinator"} | (
        {"worker-torch"} if rendered is render_watched("overlays/gpu") else set()
    )
    images = {each.container["image"] for each in rendered.workloads}
    assert images == {f"inferfleet/{name}:{VERSION}" for name in names}


def test_what_is_mounted_is_there(rendered: Rendered) -> None:
    """Every ConfigMap and claim that a pod mounts is made here, and a mount never hides another."""
    for each in rendered.workloads:
        mounted = each.mounted()
        for path, volume in mounted.items():
            if "configMap" in volume:
                assert rendered.data(each, path)
            if "persistentVolumeClaim" in volume:
                rendered.one("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
            assert not any(other.startswith(f"{path}/") for other in mounted)
        assert {each["name"] for each in each.pod["volumes"]} == {v["name"] for v in mounted.values()}


def test_updates_take_no_worker_away_first(base: Rendered) -> None:
    """A rolling update brings one more before one goes, and so does whoever empties a node."""
    for name in ("worker", "coordinator"):
        spec = base.workload(name).manifest["spec"]
        assert spec["replicas"] == 2
        assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        assert base.one("PodDisruptionBudget", name)["spec"]["maxUnavailable"] == 1


@pytest.mark.parametrize("overlay", ["overlays/kafka-keda", "overlays/rabbitmq-keda"])
def test_the_number_of_workers_is_kedas(overlay: str) -> None:
    """Where KEDA scales a Deployment, the manifest says no number that an apply would set back."""
    rendered = render(overlay)
    (scaled,) = rendered.of("ScaledObject")
    target = rendered.workload(scaled["spec"]["scaleTargetRef"]["name"])
    assert target.name == "worker"
    assert "replicas" not in target.manifest["spec"]
    assert 0 < scaled["spec"]["minReplicaCount"] < scaled["spec"]["maxReplicaCount"]


def _normal(workload: Workload) -> Manifest:
    """Return a pod without what a job may have otherwise."""
    pod = copy.deepcopy(workload.pod)
    for key in ("restartPolicy", "topologySpreadConstraints"):
        pod.pop(key, None)
    pod["containers"][0].pop("args")
    return pod


def test_a_jobs_worker_is_the_same_worker(base: Rendered) -> None:
    """The pod of the ScaledJob differs from the Deployment's in what makes it end, and in nothing else."""
    job = render("overlays/job").workload("worker")
    deployment = base.workload("worker")
    assert _normal(job) == _normal(deployment)
    assert job.labels == deployment.labels
    assert job.container["args"][:-2] == deployment.container["args"]
    assert job.container["args"][-2] == "--until-idle"
    assert job.pod["restartPolicy"] == "OnFailure"


def test_a_pool_on_gpus_is_a_pool_of_its_own() -> None:
    """Its name, its label and its device differ; no update wants two GPUs where one is."""
    rendered = render("overlays/gpu")
    ours, other = rendered.workload("worker-gpu"), rendered.workload("worker")
    assert ours.environment["INFERFLEET__WORKER__POOL"] == ours.labels["inferfleet/pool"] == "gpu"
    assert ours.environment["INFERFLEET__WORKER__DEVICE"] == "cuda"
    assert "INFERFLEET__WORKER__POOL" not in other.environment
    assert other.labels["inferfleet/pool"] == "default"
    assert ours.container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert ours.manifest["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    assert ours.mounted() == other.mounted()
