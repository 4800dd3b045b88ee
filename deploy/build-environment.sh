#!/bin/sh
# Inside a build of deploy/Dockerfile: the environment of one image at /opt/inferfleet/venv, from its lock file.
set -eu
name=$1
venv=/opt/inferfleet/venv
python3 -m venv --without-pip "$venv"
uv --quiet --no-cache pip install --python "$venv/bin/python" --require-hashes -r "requirements/$name.lock"
uv --quiet --no-cache pip install --python "$venv/bin/python" --no-deps --no-build-isolation .
# Only needed to build.
uv --quiet pip uninstall --python "$venv/bin/python" hatchling editables pathspec pluggy trove-classifiers
# Tests of libraries are of no use here; what is run is compiled now, since nobody may write later.
find "$venv" -type d \( -name tests -o -name test \) -path '*/site-packages/*' -prune -exec rm -rf {} +
"$venv/bin/python" -m compileall -q -x 'pygments|f2py' "$venv/lib" > /dev/null || true
