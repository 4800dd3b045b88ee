#!/bin/sh
# Copies the models of this image into the repository's volume; a version that is there already stays.
# A version appears whole: it is copied beside its place and renamed.
set -eu
from=/opt/inferfleet/models
to=/var/lib/inferfleet
cd "$from"
for version in */*; do
    [ -e "$to/$version" ] && { echo "models: $version is there"; continue; }
    mkdir -p "$to/${version%/*}"
    rm -rf "$to/${version%/*}/.arriving"
    cp -R "$version" "$to/${version%/*}/.arriving"
    mv "$to/${version%/*}/.arriving" "$to/$version"
    echo "models: $version added"
done
