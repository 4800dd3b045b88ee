"""The pods of ``deploy/kubernetes`` as their processes see them: files, Secrets, settings that load."""

from __future__ import annotations

import base64
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import yaml

from inferfleet import config as settings_of
from inferfleet.cli import cli
from inferfleet.config import Config
from inferfleet.routes import Route, parse_routes
from tests.support.certificates import write_certificates
from tests.support.manifests import NAMESPACE, Rendered, Workload, kubectl, render
from tests.support.programs import REPOSITORY

PAGE = REPOSITORY / "docs" / "how-to" / "kubernetes.md"
SECRETS = "/run/inferfleet"
"""Where a pod finds its Secret; the coordinator's certificate stands beside it under a longer name."""

Secrets = dict[str, dict[str, dict[str, bytes]]]
"""What each Secret holds, by broker, name and key."""


def commands() -> Iterator[list[str]]:
    """Yield the words of each command in the page's blocks of shell."""
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


def make_secrets(folder: Path) -> Secrets:
    """Return the Secrets that the page's own commands make; kubectl makes them for real, for no cluster.

    Those for a folder and a token run in a shell. The page has five commands for Kafka, then five for
    RabbitMQ. Files that it names and does not make hold their own name.
    """
    place = folder / "secrets"
    files = write_certificates(folder / "made")
    _make_token(folder)
    for name, file in (("tls.crt", files.chain), ("tls.key", files.key), ("ca.crt", files.authority)):
        shutil.copy(file, place / name)

    found: list[tuple[str, dict[str, bytes]]] = []
    for words in commands():
        if words[:5] == ["kubectl", "-n", NAMESPACE, "create", "secret"]:
            for word in words:
                named = folder / word.rpartition("=")[2]
                if word.startswith("--from-file") and not named.exists():
                    named.write_text(f"the content of {named.name}\n")
            found.append(_create(words[1:], folder))
    return {"kafka": dict(found[:5]), "rabbitmq": dict(found[5:])}


def _make_token(folder: Path) -> None:
    """Run the page's lines that make the folder and a token, word for word, under the usual umask."""
    lines = PAGE.read_text().partition("\nmkdir -m ")[2].partition("\nkubectl ")[0]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = f"umask 022\nmkdir -m {lines}"
    subprocess.run(
        ["sh", "-euc", script], cwd=folder, env={**os.environ, "PATH": path}, check=True, timeout=60
    )


def _create(arguments: list[str], folder: Path) -> tuple[str, dict[str, bytes]]:
    command = [kubectl(), *arguments, "--dry-run=client", "-o", "yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    made = yaml.safe_load(done.stdout)
    data = {key: base64.b64decode(text) for key, text in made["data"].items()}
    return made["metadata"]["name"], data


def broker_of(overlay: str) -> str:
    """Return which broker an overlay is for."""
    return "rabbitmq" if "rabbitmq" in overlay else "kafka"


class Pod(NamedTuple):
    """A workload's files, laid out below a folder, and the settings that its process loads from them."""

    workload: Workload
    root: Path
    config: Config


def _lay_out(
    rendered: Rendered, workload: Workload, secrets: dict[str, dict[str, bytes]], root: Path
) -> dict[str, str]:
    """Write what is mounted; return the environment with the paths of ``root``."""
    for path, volume in workload.mounted().items():
        place = root / path.lstrip("/")
        place.mkdir(parents=True)
        if "configMap" in volume:
            for name, text in rendered.data(workload, path).items():
                (place / name).write_text(text.replace(SECRETS, f"{root}{SECRETS}"))
        elif "secret" in volume:
            for name, data in secrets[volume["secret"]["secretName"]].items():
                (place / name).write_bytes(data)
    return {name: value.replace(SECRETS, f"{root}{SECRETS}") for name, value in workload.environment.items()}


def pods(overlay: str, secrets: Secrets, folder: Path) -> list[Pod]:
    """Return all pods of an overlay with the settings that their processes load."""
    rendered, found = render(overlay), []
    for workload in rendered.workloads:
        root = folder / workload.name
        environ = _lay_out(rendered, workload, secrets[broker_of(overlay)], root)
        file = root / environ.pop(settings_of.PATH_VARIABLE).lstrip("/")
        config = settings_of.load(file, environ)
        settings_of.check_supported(config)
        found.append(Pod(workload, root, config))
    return found


def routes_of(rendered: Rendered) -> tuple[Route, ...]:
    """Return the routes that the toolbox applies."""
    text = rendered.data(rendered.workload("toolbox"), "/etc/inferfleet-routes")["routes.toml"]
    return parse_routes(text, "inferfleet", "routes.toml").routes


def parse_call(words: list[str]) -> dict[str, Any]:
    """Parse a command line as ``inferfleet`` does; return the options of the innermost verb."""
    command: click.Command = cli
    context = click.Context(command, info_name="inferfleet")
    while True:
        parsed = command.make_context(context.info_name, list(words), parent=context.parent)
        rest = [*parsed._protected_args, *parsed.args]
        if not isinstance(command, click.Group) or not rest:
            return parsed.params
        name, found, words = command.resolve_command(parsed, rest)
        assert found is not None, name
        command, context = found, click.Context(found, info_name=name, parent=parsed)
