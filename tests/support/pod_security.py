"""The profile `restricted` of Kubernetes' Pod Security Standards, as a check of one pod's description.

Sources: the standard's own table (baseline and restricted) as of Kubernetes 1.34, field by field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

VOLUMES = frozenset(
    (
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    )
)
SECCOMP = ("RuntimeDefault", "Localhost")
SELINUX_TYPES = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
SYSCTLS = frozenset(
    (
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ping_group_range",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_rmem",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.tcp_wmem",
    )
)
_HANDLERS = ("startupProbe", "readinessProbe", "livenessProbe")


def violations(pod: Mapping[str, Any]) -> list[str]:
    """Return what the profile forbids in a pod's ``spec``, each as the field at fault; ``[]``: admitted."""
    return [*_of_pod(pod), *(each for container in containers(pod) for each in _of_container(pod, container))]


def containers(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return every container of a pod's ``spec``, of all three kinds."""
    kinds = ("initContainers", "containers", "ephemeralContainers")
    return [container for kind in kinds for container in pod.get(kind, ())]


def _of_pod(pod: Mapping[str, Any]) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield field
    for volume in pod.get("volumes", ()):
        if not (volume.keys() - {"name"}) <= VOLUMES:
            yield f"volumes.{volume['name']}"
    security = pod.get("securityContext", {})
    for sysctl in security.get("sysctls", ()):
        if sysctl["name"] not in SYSCTLS:
            yield f"securityContext.sysctls.{sysctl['name']}"
    yield from _of_context(security, "securityContext")


def _of_context(security: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield what neither a pod nor a container may say of itself."""
    if security.get("runAsUser") == 0:
        yield f"{where}.runAsUser"
    if security.get("windowsOptions", {}).get("hostProcess"):
        yield f"{where}.windowsOptions.hostProcess"
    if security.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in SECCOMP:
        yield f"{where}.appArmorProfile.type"
    if security.get("seccompProfile", {}).get("type", "RuntimeDefault") not in SECCOMP:
        yield f"{where}.seccompProfile.type"
    if security.get("runAsNonRoot", True) is not True:
        yield f"{where}.runAsNonRoot"
    linux = security.get("seLinuxOptions", {})
    if linux.get("type", "") not in SELINUX_TYPES or linux.get("user") or linux.get("role"):
        yield f"{where}.seLinuxOptions"


def _of_container(pod: Mapping[str, Any], container: Mapping[str, Any]) -> Iterator[str]:
    security, around = container.get("securityContext", {}), pod.get("securityContext", {})
    where = f"{container['name']}.securityContext"
    yield from _of_context(security, where)
    if security.get("privileged"):
        yield f"{where}.privileged"
    if security.get("allowPrivilegeEscalation") is not False:
        yield f"{where}.allowPrivilegeEscalation"
    if security.get("procMount", "Default") != "Default":
        yield f"{where}.procMount"
    # What is said for the pod holds for its containers; said nowhere, the default is not good enough.
    for field in ("runAsNonRoot", "seccompProfile"):
        if field not in security and field not in around:
            yield f"{where}.{field}"
    capabilities = security.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", ()):
        yield f"{where}.capabilities.drop"
    if not set(capabilities.get("add", ())) <= {"NET_BIND_SERVICE"}:
        yield f"{where}.capabilities.add"
    for port in container.get("ports", ()):
        if port.get("hostPort"):
            yield f"{container['name']}.ports.hostPort"
    hooks = container.get("lifecycle", {})
    for handler in (*(container.get(name, {}) for name in _HANDLERS), *hooks.values()):
        if any(handler.get(kind, {}).get("host") for kind in ("httpGet", "tcpSocket")):
            yield f"{container['name']}: a probe or hook names a host"
