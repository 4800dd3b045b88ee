#!/bin/sh
# Makes what nobody may guess, once, in a volume of its own: the coordinator's tokens and two passwords.
# Nothing of it is printed. `docker compose exec -T coordinator cat /run/inferfleet/admin.token` shows the token.
set -eu
umask 077
folder=/var/lib/inferfleet
random() {
    python -c 'import secrets; print(secrets.token_urlsafe(24))'
}

if [ ! -s "$folder/admin.token" ]; then
    INFERFLEET__COORDINATOR__TOKEN_FILE=$folder/tokens
    export INFERFLEET__COORDINATOR__TOKEN_FILE
    rm -f "$folder/tokens"
    inferfleet coordinator token admin --role admin > "$folder/admin.token.new"
    mv "$folder/admin.token.new" "$folder/admin.token"
    echo "secrets: made a token for the coordinator"
fi

# Read by other users, in containers that mount this volume; so these may be read by all of those.
umask 022
chmod 755 "$folder"
if [ ! -s "$folder/grafana-admin-password" ]; then
    random | tr -d '\n' > "$folder/grafana-admin-password"
    echo "secrets: made a password for Grafana's user admin"
fi
if [ ! -s "$folder/rabbitmq/10-user.conf" ]; then
    password=$(random)
    mkdir -p "$folder/rabbitmq"
    printf '%s\n' "$password" > "$folder/rabbitmq-password"
    printf 'log.console = true\ndefault_user = inferfleet\ndefault_pass = %s\n' "$password" > "$folder/rabbitmq/10-user.conf"
    echo "secrets: made a password for RabbitMQ's user inferfleet"
fi
