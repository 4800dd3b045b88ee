"""inferfleet: requests in Kafka become predictions in Kafka and Redis, batch by batch, none lost."""

__version__ = "0.1.0"
