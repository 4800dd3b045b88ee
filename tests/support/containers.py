"""The container engine of this machine, and images for it: pulled, built, or stood in for.

Docker where its daemon answers, else podman with runc. Where base images cannot be pulled, a Debian from the
package mirror stands in under their names, with the real Kafka, Valkey and Prometheus of the other tests
inside; they carry the label ``inferfleet.stand-in``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from inferfleet import __version__
from tests.support import programs
from tests.support.programs import REPOSITORY, MissingServerError

CACHE = REPOSITORY / ".cache" / "containers"
RECIPES = Path(__file__).with_name("stand_ins")
PYTHON = "docker.io/library/python:3.13-slim-bookworm"
OURS = ("coordinator", "worker-onnx", "demo")
LABEL = "inferfleet.stand-in"
PODMAN_PACKAGES = ("podman", "buildah", "runc", "netavark", "aardvark-dns", "iptables", "debootstrap")
PODMAN_COMPOSE = "podman-compose==1.6.0"
DEBIAN = (
    "python3", "python3-venv", "python3-pip", "ca-certificates", "default-jre-headless", "prometheus",
    "redis-tools",
)  # fmt: skip
PULL_S = 180

_PODMAN = """\
#!/bin/sh
# podman without the flag of health checks that an old one (4.3) does not know.
count=$#
skip=
while [ "$count" -gt 0 ]; do
    word=$1
    shift
    count=$((count - 1))
    if [ -n "$skip" ]; then
        skip=
        continue
    fi
    case $word in
        --health-startup-interval) skip=1 ;;
        *) set -- "$@" "$word" ;;
    esac
done
exec podman "$@"
"""


class Engine(NamedTuple):
    """How containers are run: the engine's command, the one for compose files, and what both need to know."""

    name: str
    command: tuple[str, ...]
    compose: tuple[str, ...]
    environment: Mapping[str, str]
    build_options: tuple[str, ...]

    def run(self, *words: str, timeout_s: float = 120, cwd: Path = REPOSITORY) -> str:
        """Return what a command of the engine prints; raises MissingServerError with its last line."""
        done = subprocess.run(
            [*self.command, *words],
            cwd=cwd,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise MissingServerError(f"{self.name} {' '.join(words[:2])} failed: {said}")
        return done.stdout

    def has(self, image: str) -> bool:
        """Return whether an image is here already."""
        try:
            self.run("image", "inspect", image)
        except MissingServerError:
            return False
        return True


def engine() -> Engine:
    """Return docker where it answers, else podman, installed where that may be done.

    Raises :class:`~tests.support.programs.MissingServerError` with one line that says what is missing.
    """
    docker = shutil.which("docker")
    if docker is not None:
        try:
            found = Engine("docker", (docker,), (docker, "compose"), {}, ())
            found.run("info")
            found.run("compose", "version")
            return found
        except MissingServerError:
            pass
    return _podman()


def _podman() -> Engine:
    if shutil.which("podman") is None:
        for package in PODMAN_PACKAGES:
            programs.install_package(package)
    compose = _podman_compose()
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "containers.conf").write_text(_podman_settings())
    wrapper = CACHE / "podman"
    wrapper.write_text(_PODMAN)
    wrapper.chmod(0o755)
    certificates = "/etc/ssl/certs:/etc/ssl/certs:ro"
    return Engine(
        "podman",
        (shutil.which("podman") or "podman",),
        (str(compose), "--in-pod=false", "--podman-path", str(wrapper)),
        {"CONTAINERS_CONF": str(CACHE / "containers.conf")},
        ("--network", "host", "--isolation", "chroot", "-v", certificates),
    )


def _podman_settings() -> str:
    """Return what makes podman run where crun or systemd do not: runc, cgroups of its own, low limits."""
    limits = 'default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]'
    runtime = ['runtime = "runc"'] if shutil.which("runc") else []
    folders = (Path("/usr/lib/podman"), Path("/usr/libexec/podman"))
    network = (
        ['network_backend = "netavark"'] if any((each / "netavark").exists() for each in folders) else []
    )
    engine = ["[engine]", *runtime, 'cgroup_manager = "cgroupfs"', 'events_logger = "file"']
    return "\n".join([*engine, "[network]", *network, "[containers]", limits, ""])


def _podman_compose() -> Path:
    """Return podman-compose, in an environment of its own; it is installed the first time."""
    folder = CACHE.with_name("podman-compose")
    program = folder / "bin" / "podman-compose"
    if not program.exists():
        uv = [str(CACHE.with_name("uv") / "bin" / "uv"), "--quiet", "--system-certs"]
        index = package_index()
        _run("podman-compose", [*uv, "venv", "--clear", "--python", sys.executable, str(folder)])
        where = ["--python", str(folder / "bin" / "python"), *(["--default-index", index] if index else [])]
        _run("podman-compose", [*uv, "pip", "install", *where, PODMAN_COMPOSE])
    return program


def package_index() -> str:
    """Return the package index that uv or pip was told of; empty where it is the usual one."""
    named = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")
    if named:
        return named
    pip = ["python3", "-m", "pip", "config", "get", "global.index-url"]
    return subprocess.run(pip, capture_output=True, text=True, check=False).stdout.strip()


def _run(what: str, command: Sequence[str], timeout_s: float = 300) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout_s
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise MissingServerError(f"{what}: {said}")


def prepare(engine: Engine, others: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Have our images built and the ``others`` pulled or stood in for; return those that cannot be had.

    ``say`` hears in one line whether stand-ins are used.
    """
    missing = [each for each in (PYTHON, *others) if not engine.has(each) and not _pulled(engine, each)]
    if missing:
        _stand_in_base(engine)
        for image in missing:
            if image != PYTHON and _recipe(image).exists():
                _stand_in(engine, image)
    stood_in = [each for each in (PYTHON, *others) if engine.has(each) and _is_stand_in(engine, each)]
    if stood_in:
        say(f"stand-ins, no registry answers: {', '.join(stood_in)}")
    for target in OURS:
        build(engine, target)
    return [each for each in others if not engine.has(each)]


def usable_engine(say: Callable[[str], None]) -> Engine:
    """Return an engine that has a Python base image and has run a container of it.

    Raises MissingServerError where this machine cannot: no fault of our images or of the compose file,
    whose faults come after it.
    """
    found = engine()
    try:
        if not found.has(PYTHON) and not _pulled(found, PYTHON):
            say("no registry answers: a Debian is made to stand in")
            _stand_in_base(found)
        found.run("run", "--rm", "--entrypoint", "/bin/true", PYTHON)
    except subprocess.TimeoutExpired as error:
        raise MissingServerError(f"{found.name} did not end within {error.timeout:g} s") from None
    return found


def build(engine: Engine, target: str) -> str:
    """Build one target of ``deploy/Dockerfile`` and return its name."""
    image = image_name(target)
    index = package_index()
    told = [
        "--build-arg",
        f"REVISION={_revision()}",
        *(["--build-arg", f"INDEX_URL={index}"] if index else []),
    ]
    words = ["build", "-q", *engine.build_options, *told, "-f", "deploy/Dockerfile", "--target", target]
    engine.run(*words, "-t", image, ".", timeout_s=900)
    return image


def _revision() -> str:
    """Return the commit of this folder, where it is a repository."""
    git = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(git, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def sizes(engine: Engine) -> str:
    """Return how much each of our images adds to its base, in MB (1,000,000 bytes)."""
    return ", ".join(f"{name} {added(engine, name) / 1e6:.0f} MB" for name in OURS)


def added(engine: Engine, target: str) -> int:
    """Return the bytes that one of our images adds to its base."""
    return _size(engine, image_name(target)) - _size(engine, PYTHON)


def image_name(target: str) -> str:
    """Return the name of one of our images."""
    return f"docker.io/inferfleet/{target}:{__version__}"


def _size(engine: Engine, image: str) -> int:
    return int(engine.run("image", "inspect", "--format", "{{.Size}}", image))


def _pulled(engine: Engine, image: str) -> bool:
    try:
        engine.run("pull", "-q", image, timeout_s=PULL_S)
    except (MissingServerError, subprocess.TimeoutExpired):
        return False
    return True


def _is_stand_in(engine: Engine, image: str) -> bool:
    labels = json.loads(engine.run("image", "inspect", "--format", "{{json .Config.Labels}}", image)) or {}
    return LABEL in labels


def _recipe(image: str) -> Path:
    """Return the Dockerfile of a stand-in: ``apache/kafka:4.3.1`` is ``stand_ins/kafka.Dockerfile``."""
    return RECIPES / f"{image.rpartition('/')[2].partition(':')[0]}.Dockerfile"


def _stand_in_base(engine: Engine) -> None:
    """Make a Debian with Python, Java and Prometheus, under the name of the Python image."""
    if engine.has(PYTHON):
        return
    if shutil.which("debootstrap") is None:
        programs.install_package("debootstrap")
    root = CACHE / "rootfs"
    shutil.rmtree(root, ignore_errors=True)
    included = f"--include={','.join(DEBIAN)}"
    _run("debootstrap", ["debootstrap", "--variant=minbase", included, "bookworm", str(root)], 900)
    archive = CACHE / "rootfs.tar"
    left_out = ["--exclude=./var/cache/apt/archives", "--exclude=./proc", "--exclude=./sys"]
    _run("packing a Debian", ["tar", "-C", str(root), *left_out, "-cf", str(archive), "."], 300)
    shutil.rmtree(root, ignore_errors=True)
    change = ["--change", f"LABEL {LABEL}=debian"]
    engine.run("import", *change, str(archive), PYTHON, timeout_s=300)
    archive.unlink()


def _stand_in(engine: Engine, image: str) -> None:
    """Build a stand-in from its recipe, with the programs that the other tests run."""
    folder = CACHE / "context"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for script in RECIPES.glob("*.sh"):
        shutil.copy(script, folder)
    if "kafka" in image:
        shutil.copytree(programs.kafka_libs(), folder / "libs")
    if "valkey" in image:
        shutil.copy(programs.redis_server(), folder / "valkey-server")
    words = ["build", "-q", *engine.build_options, "--label", f"{LABEL}=debian", "-f", str(_recipe(image))]
    engine.run(*words, "-t", image, str(folder), timeout_s=600)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Build our images and print what each adds to its base."""
    try:
        found = engine()
        prepare(found, (), print)
        print(f"{found.name}; our own layers: {sizes(found)}")
    except MissingServerError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
