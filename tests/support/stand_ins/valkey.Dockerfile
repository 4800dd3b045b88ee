# Stands in for valkey/valkey: the real server as a user of its own.
FROM docker.io/library/python:3.13-slim-bookworm
RUN useradd -r valkey && mkdir -p /data && chown valkey /data \
    && ln -s /usr/bin/redis-cli /usr/local/bin/valkey-cli
COPY --chmod=755 valkey-server /usr/local/bin/
WORKDIR /data
VOLUME /data
USER valkey
CMD ["valkey-server"]
