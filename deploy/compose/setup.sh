#!/bin/sh
# Topics or queues for the routes of FILE, then the routes themselves; waits for the servers, bounded.
# Routes that stand already stay as they are: what was rolled out is not taken back by the next `up`.
set -eu
file=$1
patience_s=300
ends_at=$(($(date +%s) + patience_s))

# Runs a command until it succeeds; says why it waits, once for each reason. A failure is temporary here as
# long as there is time: which server is away, the command itself says in one line.
patiently() {
    told=
    until said=$("$@" 2>&1); do
        [ "$(date +%s)" -lt "$ends_at" ] || { echo "setup: gave up after $patience_s s: $said" >&2; return 1; }
        [ "$said" = "$told" ] || echo "setup: waiting: $said"
        told=$said
        sleep 1
    done
    [ -z "$said" ] || echo "$said"
}

patiently inferfleet topics plan --routes "$file" --apply
patiently inferfleet route list > /dev/null
missing=0
for name in $(sed -n 's/^name = "\(.*\)"/\1/p' "$file"); do
    inferfleet route show "$name" > /dev/null 2>&1 || missing=1
done
if [ "$missing" = 0 ]; then
    echo "setup: the routes of $file stand already"
else
    patiently inferfleet route apply "$file" --yes --actor setup --reason "first routes"
fi
