"""Kafka access rules as ``kafka-acls.sh`` takes them on its command line, read into client objects."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable

from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)

_RESOURCES = {
    "topic": ResourceType.TOPIC,
    "group": ResourceType.GROUP,
    "transactional_id": ResourceType.TRANSACTIONAL_ID,
}
_CLUSTER_NAME = "kafka-cluster"


def parse_acls(text: str | Iterable[str]) -> list[AclBinding]:
    """Return the bindings that ``kafka-acls.sh`` would add for these lines.

    A line may start with the script's name and carry connection options, which are ignored. Empty lines
    and those that start with ``#`` are skipped; a line may go on after a backslash at its end. Raises
    ``ValueError`` that names a line which is not understood.
    """
    whole = text if isinstance(text, str) else "\n".join(text)
    bindings: list[AclBinding] = []
    for line in whole.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            bindings += _bindings(line, [word for word in words if word != "kafka-acls.sh"])
    return bindings


def _bindings(line: str, words: list[str]) -> list[AclBinding]:
    given, unknown = _parser().parse_known_args(words)
    resources = [(kind, name) for word, kind in _RESOURCES.items() for name in getattr(given, word)]
    if given.cluster:
        resources.append((ResourceType.BROKER, _CLUSTER_NAME))
    principals = [(name, AclPermissionType.ALLOW) for name in given.allow_principal]
    principals += [(name, AclPermissionType.DENY) for name in given.deny_principal]
    stray = [word for word in unknown if "kafka-acls" not in word and word not in ("sh", "bash")]
    if stray or not resources or not principals:
        raise ValueError(f"not a kafka-acls.sh line ({stray or 'no principal or resource'}): {line.strip()}")
    pattern = ResourcePatternType[given.resource_pattern_type.upper()]
    return [
        AclBinding(kind, name, pattern, principal, given.host, AclOperation[operation], permission)
        for kind, name in resources
        for principal, permission in principals
        for operation in given.operation
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for ignored in ("--bootstrap-server", "--command-config"):
        parser.add_argument(ignored)
    for flag in ("--add", "--force", "--cluster"):
        parser.add_argument(flag, action="store_true")
    for named in ("--topic", "--group", "--transactional-id", "--allow-principal", "--deny-principal"):
        parser.add_argument(named, action="append", default=[])
    parser.add_argument("--operation", action="append", default=[], type=_operation)
    parser.add_argument("--resource-pattern-type", default="literal")
    parser.add_argument("--allow-host", "--deny-host", dest="host", default="*")
    return parser


def _operation(word: str) -> str:
    """Return the client's name: the script takes ``DescribeConfigs`` as well as ``DESCRIBE_CONFIGS``."""
    return word if word.isupper() else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).upper()
