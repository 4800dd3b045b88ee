# Stands in for prom/prometheus: Debian's.
FROM docker.io/library/python:3.13-slim-bookworm
RUN mkdir -p /prometheus && chown nobody /prometheus
USER nobody
VOLUME /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
