#!/bin/sh
# Inside a build of deploy/Dockerfile, the environment of one image at /opt/inferfleet/venv:
#   build-environment.sh packages NAME   what requirements/NAME.lock says
#   build-environment.sh project         inferfleet itself, and what is of no use in an image taken out
set -eu
venv=/opt/inferfleet/venv
uv="uv --quiet --no-cache pip"
case $1 in
    packages)
        python3 -m venv --without-pip "$venv"
        $uv install --python "$venv/bin/python" --require-hashes -r "requirements/$2.lock"
        ;;
    project)
        $uv install --python "$venv/bin/python" --no-deps --no-build-isolation .
        # Only needed to build.
        $uv uninstall --python "$venv/bin/python" hatchling editables pathspec pluggy trove-classifiers
        # Tests of libraries are of no use here; what is run is compiled now, since nobody may write later.
        find "$venv" -type d \( -name tests -o -name test \) -path '*/site-packages/*' -prune -exec rm -rf {} +
        "$venv/bin/python" -m compileall -q -x 'pygments|f2py' "$venv/lib" > /dev/null || true
        ;;
    *)
        echo "build-environment.sh: packages or project, not $1" >&2
        exit 2
        ;;
esac
