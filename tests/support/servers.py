"""The real servers in one place: ``with KafkaServer(folder) as kafka: ...``."""

from tests.support.kafka_server import ADMIN_USER, ClientConfig, KafkaServer
from tests.support.process import ServerError, free_ports
from tests.support.programs import MissingServerError
from tests.support.rabbitmq_cluster import RabbitCluster
from tests.support.rabbitmq_server import RabbitServer
from tests.support.redis_server import RedisServer

__all__ = [
    "ADMIN_USER",
    "ClientConfig",
    "KafkaServer",
    "MissingServerError",
    "RabbitCluster",
    "RabbitServer",
    "RedisServer",
    "ServerError",
    "free_ports",
]
