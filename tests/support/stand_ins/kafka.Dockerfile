# Stands in for apache/kafka: the real broker, its settings from KAFKA_* variables as there.
FROM docker.io/library/python:3.13-slim-bookworm
RUN useradd -u 1000 appuser && mkdir -p /opt/kafka/config /var/lib/kafka/data \
    && chown -R appuser /opt/kafka /var/lib/kafka
COPY libs /opt/kafka/libs
COPY --chmod=755 kafka.sh /usr/local/bin/
USER appuser
VOLUME /var/lib/kafka/data
CMD ["kafka.sh"]
