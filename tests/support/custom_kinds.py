"""JSON Schemas of the kinds that KEDA and the Prometheus operator add, as far as our manifests use them.

Written here, by the fields that KEDA 2.16 to 2.19 and prometheus-operator 0.80 and newer document: what is
not listed is refused, so a misspelt key is found. What the operators take over from Kubernetes' own kinds,
a Job's description and an autoscaler's behaviour, is checked against those by whoever calls this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema

Schema = dict[str, Any]

_NAME: Schema = {"type": "string", "minLength": 1}
_SECONDS: Schema = {"type": "integer", "minimum": 0}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_BOOL: Schema = {"enum": ["true", "false"]}
_NUMBER: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?\Z"}
_DURATION: Schema = {"type": "string", "pattern": r"^\d+(ms|s|m|h)\Z"}


def _table(required: str = "", **fields: Schema) -> Schema:
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of, "minItems": 1}


def _kind(api_version: str, kind: str, spec: Schema) -> Schema:
    metadata = {"type": "object", "required": ["name", "namespace"]}
    return _table(
        "apiVersion kind metadata spec",
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


# Every value of a trigger's metadata is a text, numbers and truth values too.
_KAFKA = _table(
    "bootstrapServers consumerGroup topic",
    bootstrapServers=_NAME,
    consumerGroup=_NAME,
    topic=_NAME,
    lagThreshold=_NUMBER,
    activationLagThreshold=_NUMBER,
    offsetResetPolicy={"enum": ["latest", "earliest"]},
    allowIdleConsumers=_BOOL,
    scaleToZeroOnInvalidOffset=_BOOL,
    excludePersistentLag=_BOOL,
    limitToPartitionsWithLag=_BOOL,
    ensureEvenDistributionOfPartitions=_BOOL,
    partitionLimitation=_NAME,
    version=_NAME,
    sasl={"enum": ["none", "plaintext", "scram_sha256", "scram_sha512", "gssapi", "oauthbearer"]},
    tls={"enum": ["enable", "disable"]},
    unsafeSsl=_BOOL,
)
_KAFKA["not"] = {  # with both, KEDA refuses the trigger
    "properties": {"allowIdleConsumers": {"const": "true"}, "limitToPartitionsWithLag": {"const": "true"}},
    "required": ["allowIdleConsumers", "limitToPartitionsWithLag"],
}
_RABBITMQ = _table(
    "queueName mode value",
    queueName=_NAME,
    mode={"enum": ["QueueLength", "MessageRate"]},
    value=_NUMBER,
    activationValue=_NUMBER,
    protocol={"enum": ["auto", "http", "amqp"]},
    vhostName=_NAME,
    excludeUnacknowledged=_BOOL,
    unsafeSsl=_BOOL,
    timeout=_NUMBER,
)


def _trigger(kind: str, metadata: Schema) -> Schema:
    return _table(
        "type metadata",
        type={"const": kind},
        name=_NAME,
        metadata=metadata,
        metricType={"enum": ["AverageValue", "Value"]},
        useCachedMetrics={"type": "boolean"},
        authenticationRef=_table(
            "name", name=_NAME, kind={"enum": ["TriggerAuthentication", "ClusterTriggerAuthentication"]}
        ),
    )


_TRIGGERS = _list({"oneOf": [_trigger("kafka", _KAFKA), _trigger("rabbitmq", _RABBITMQ)]})
_ANYTHING: Schema = {"type": "object"}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_RULES = [
    _table("record expr", record=_NAME, expr=_NAME, labels=_TEXTS),
    _table(
        "alert expr",
        alert=_NAME,
        expr=_NAME,
        labels=_TEXTS,
        annotations=_TEXTS,
        **{"for": _DURATION, "keep_firing_for": _DURATION},
    ),
]

SCHEMAS: dict[str, Schema] = {
    "ScaledObject": _kind(
        "keda.sh/v1alpha1",
        "ScaledObject",
        _table(
            "scaleTargetRef triggers",
            scaleTargetRef=_table(
                "name", name=_NAME, kind=_NAME, apiVersion=_NAME, envSourceContainerName=_NAME
            ),
            pollingInterval=_SECONDS,
            cooldownPeriod=_SECONDS,
            initialCooldownPeriod=_SECONDS,
            idleReplicaCount={"const": 0},
            minReplicaCount=_COUNT,
            maxReplicaCount=_COUNT,
            fallback=_table("failureThreshold replicas", failureThreshold=_COUNT, replicas=_COUNT),
            advanced=_table(
                restoreToOriginalReplicaCount={"type": "boolean"},
                horizontalPodAutoscalerConfig=_table(name=_NAME, behavior=_ANYTHING),
            ),
            triggers=_TRIGGERS,
        ),
    ),
    "ScaledJob": _kind(
        "keda.sh/v1alpha1",
        "ScaledJob",
        _table(
            "jobTargetRef triggers",
            jobTargetRef=_ANYTHING,
            envSourceContainerName=_NAME,
            pollingInterval=_SECONDS,
            minReplicaCount=_COUNT,
            maxReplicaCount=_COUNT,
            successfulJobsHistoryLimit=_COUNT,
            failedJobsHistoryLimit=_COUNT,
            rollout=_table(
                strategy={"enum": ["default", "gradual"]},
                propagationPolicy={"enum": ["background", "foreground"]},
            ),
            scalingStrategy=_table(
                strategy={"enum": ["default", "custom", "accurate", "eager"]},
                multipleScalersCalculation={"enum": ["max", "min", "avg", "sum"]},
                pendingPodConditions=_list(_NAME),
                customScalingQueueLengthDeduction=_COUNT,
                customScalingRunningJobPercentage=_NUMBER,
            ),
            triggers=_TRIGGERS,
        ),
    ),
    "TriggerAuthentication": _kind(
        "keda.sh/v1alpha1",
        "TriggerAuthentication",
        _table(
            "secretTargetRef",
            secretTargetRef=_list(_table("parameter name key", parameter=_NAME, name=_NAME, key=_NAME)),
        ),
    ),
    "PodMonitor": _kind(
        "monitoring.coreos.com/v1",
        "PodMonitor",
        _table(
            "selector podMetricsEndpoints",
            jobLabel=_NAME,
            podTargetLabels=_list(_NAME),
            selector=_table("matchLabels", matchLabels=_ANYTHING),
            namespaceSelector=_table(any={"type": "boolean"}, matchNames=_list(_NAME)),
            podMetricsEndpoints=_list(
                _table(
                    "port",
                    port=_NAME,
                    path={"type": "string", "pattern": "^/"},
                    scheme={"enum": ["http", "https"]},
                    interval=_DURATION,
                    scrapeTimeout=_DURATION,
                    honorLabels={"type": "boolean"},
                )
            ),
        ),
    ),
    "PrometheusRule": _kind(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        _table(
            "groups",
            groups=_list(
                _table("name rules", name=_NAME, interval=_DURATION, rules=_list({"oneOf": _RULES}))
            ),
        ),
    ),
}


def check(found: Mapping[str, Any]) -> None:
    """Raise ``jsonschema.ValidationError`` for what its operator would not take."""
    schema = SCHEMAS[str(found["kind"])]
    jsonschema.Draft202012Validator(schema).validate(found)
