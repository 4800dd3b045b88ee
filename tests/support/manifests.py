"""``deploy/kubernetes`` as kubectl renders it, and its parts as the tests ask for them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.support.programs import REPOSITORY, MissingServerError

FOLDER = REPOSITORY / "deploy" / "kubernetes"
OPERATOR = FOLDER / "components" / "prometheus-operator"
"""What a kustomization of one's own adds where the Prometheus operator runs."""
OVERLAYS = ("base", *(f"overlays/{name}" for name in ("kafka-keda", "rabbitmq-keda", "job", "gpu")))
NAMESPACE = "inferfleet"

Manifest = dict[str, Any]


class Workload(NamedTuple):
    """What makes pods: the object, and the pods' labels and ``spec``."""

    manifest: Manifest
    labels: dict[str, str]
    pod: Manifest

    @property
    def name(self) -> str:
        """The object's name."""
        return str(self.manifest["metadata"]["name"])

    @property
    def container(self) -> Manifest:
        """Its one container."""
        (container,) = self.pod["containers"]
        return dict(container)

    @property
    def environment(self) -> dict[str, str]:
        """The variables of its container."""
        return {each["name"]: each["value"] for each in self.container.get("env", ())}

    @property
    def ports(self) -> dict[str, int]:
        """Its container's ports by name."""
        return {each["name"]: each["containerPort"] for each in self.container.get("ports", ())}

    def mounted(self) -> dict[str, Manifest]:
        """Return the volumes by the path that they are mounted at."""
        volumes = {each["name"]: each for each in self.pod["volumes"]}
        return {each["mountPath"]: volumes[each["name"]] for each in self.container["volumeMounts"]}


class Rendered(NamedTuple):
    """All objects of one kustomization."""

    objects: list[Manifest]

    def of(self, *kinds: str) -> list[Manifest]:
        """Return the objects of these kinds."""
        return [each for each in self.objects if each["kind"] in kinds]

    def one(self, kind: str, name: str) -> Manifest:
        """Return the object of this kind and name."""
        (found,) = [each for each in self.of(kind) if each["metadata"]["name"] == name]
        return found

    @property
    def workloads(self) -> list[Workload]:
        """All that makes pods."""
        found = []
        for each in self.of("Deployment", "ScaledJob"):
            job = each["kind"] == "ScaledJob"
            template = (each["spec"]["jobTargetRef"] if job else each["spec"])["template"]
            found.append(Workload(each, template["metadata"]["labels"], template["spec"]))
        return found

    def workload(self, name: str) -> Workload:
        """Return the one of this name."""
        (found,) = [each for each in self.workloads if each.name == name]
        return found

    def data(self, workload: Workload, path: str) -> Mapping[str, str]:
        """Return what the ConfigMap that is mounted at ``path`` holds, by file name."""
        name = workload.mounted()[path]["configMap"]["name"]
        return dict(self.one("ConfigMap", name)["data"])


def kubectl() -> str:
    """Return kubectl: the wheel's beside this Python, else the one on PATH; nothing here needs a cluster."""
    ours = Path(sys.executable).with_name("kubectl")
    found = str(ours) if ours.exists() else shutil.which("kubectl")
    if found is None:
        raise MissingServerError("Kubernetes: kubectl is not on PATH; install it, no cluster is needed")
    return found


def render_folder(folder: Path) -> Rendered:
    """Return what a kustomization makes; raises CalledProcessError with kubectl's words on standard error."""
    command = [kubectl(), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return Rendered([each for each in yaml.safe_load_all(done.stdout) if each is not None])


@functools.cache
def render(overlay: str) -> Rendered:
    """Return what one of :data:`OVERLAYS` makes; nobody changes what comes back."""
    return render_folder(FOLDER / overlay)


@functools.cache
def render_watched(overlay: str) -> Rendered:
    """Return what one of :data:`OVERLAYS` makes together with the component for the Prometheus operator."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        tree = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(FOLDER / overlay, folder)],
            "components": [os.path.relpath(OPERATOR, folder)],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(tree))
        return render_folder(folder)


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return whether a label selector takes these labels; of expressions it knows ``In``."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for each in selector.get("matchExpressions", ()):
        assert each["operator"] == "In", each
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True
