"""What a well-formed configuration may still not say: values that fit their type and break a promise."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from inferfleet import tables
from inferfleet.errors import Code, ConfigError

if TYPE_CHECKING:
    from inferfleet.config import Config, Redis

# Properties that inferfleet sets itself, with the setting that reaches them where there is one.
_OWNED = {
    "bootstrap.servers": "[kafka] bootstrap_servers",
    "metadata.broker.list": "[kafka] bootstrap_servers",
    "group.id": "[kafka] group",
    "group.protocol": "[kafka] group_protocol",
    "session.timeout.ms": "[kafka] session_timeout_ms",
    "group.instance.id": "[kafka] static_membership",
    "auto.offset.reset": "[kafka] start",
    "transactional.id": "[worker] id and guarantee",
    "acks": "",
    "auto.commit.enable": "",
    "auto.commit.interval.ms": "",
    "delivery.report.only.error": "",
    "enable.auto.commit": "",
    "enable.auto.offset.store": "",
    "enable.idempotence": "",
    "group.remote.assignor": "",
    "partition.assignment.strategy": "",
    "partitioner": "",
    "request.required.acks": "",
}
_VERIFICATION_OFF = {
    "enable.ssl.certificate.verification": ("false",),
    "ssl.endpoint.identification.algorithm": ("none",),
}


def check(config: Config, path: Path) -> None:
    """Refuse values that are well formed and still wrong; the message names the key and the mend."""
    kafka = config.kafka
    for table in ("client", "consumer", "producer"):
        for prop, value in getattr(kafka, table).items():
            _check_property(f"{path}: [kafka.{table}]", prop, value, kafka.insecure)
    if kafka.start not in ("earliest", "latest"):
        try:
            datetime.fromisoformat(kafka.start)
        except ValueError:
            raise ConfigError(
                f'{path}: [kafka] start is "{kafka.start}", must be "earliest", "latest" or a timestamp '
                'such as "2026-11-01T00:00:00Z"'
            ) from None
    for section in ("redis", "control"):
        _check_redis(f"{path}: [{section}]", getattr(config, section))
    for url in config.rabbitmq.url.split(","):
        if not url.strip().startswith(("amqp://", "amqps://")):
            raise ConfigError(f"{path}: [rabbitmq] url must start with amqp:// or amqps://")
    for code in config.dlt.include:
        if code not in set(Code):
            mend = tables.nearest(code, set(Code))
            raise ConfigError(f'{path}: [dlt] include names "{code}", which is no error code{mend}')
    _check_template(f"{path}: [names] dlt", config.names.dlt, {"source", "group"})
    _check_template(f"{path}: [names] retry", config.names.retry, {"source", "group", "ms"})
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", config.group):
        raise ConfigError(
            f'{path}: [kafka] group is "{config.group}", must be letters, digits, ".", "_", "-"'
        )


def _check_property(where: str, prop: str, value: str, insecure: bool) -> None:
    if prop in _OWNED:
        instead = f"; set {_OWNED[prop]} instead" if _OWNED[prop] else ", its delivery promise rests on it"
        raise ConfigError(f'{where} "{prop}" is inferfleet\'s own{instead}')
    if value.lower() in _VERIFICATION_OFF.get(prop, ()) and not insecure:
        raise ConfigError(
            f'{where} "{prop}" = "{value}" lets anyone pose as the broker; '
            "set [kafka] insecure = true if that is meant"
        )


def _check_redis(where: str, redis: Redis | None) -> None:
    if redis is None:
        return
    if not redis.url.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError(f"{where} url must start with redis://, rediss:// or unix://")
    if redis.mode == "sentinel" and not (redis.nodes and redis.sentinel_master):
        raise ConfigError(f'{where} mode = "sentinel" needs nodes and sentinel_master')


def _check_template(where: str, template: str, fields: set[str]) -> None:
    found = re.findall(r"\{([^{}]*)\}", template)
    unknown = next((each for each in found if each not in fields), None)
    if unknown is not None:
        raise ConfigError(f'{where} has no field "{{{unknown}}}"{tables.nearest(unknown, fields)}')
    lacking = fields - set(found)
    if lacking:
        raise ConfigError(f'{where} needs "{{{min(lacking)}}}", or two routes would share a name')
