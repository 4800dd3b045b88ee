"""Where the API may be offered, what the command line makes of it, and the dashboard's own files."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest
from click.testing import CliRunner

from inferfleet.cli import cli
from inferfleet.cli.coordinator import RepositoryView, holder_name
from inferfleet.config import Coordinator
from inferfleet.coordinator.endpoints import ENDPOINTS
from inferfleet.coordinator.exposure import Exposure, expose
from inferfleet.coordinator.tokens import Caller, Role, TokenBook, token_line
from inferfleet.errors import ConfigError
from inferfleet.models.repository import Repository
from inferfleet.telemetry.coordinator import CoordinatorMetrics
from inferfleet.telemetry.metrics import PREFIX
from tests.support.certificates import write_certificates

DASHBOARD = resources.files("inferfleet.coordinator") / "dashboard"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with tokens and certificates."""
    write_certificates(tmp_path)
    (tmp_path / "tokens").write_text(token_line("t", Caller("a", Role.ADMIN)))
    return tmp_path


def offered(settings: Coordinator, folder: Path) -> Exposure:
    found = expose(settings, folder, lambda: 0.0)
    found.listener.close()
    return found


TLS = {"tls_cert": "chain.pem", "tls_key": "key.pem"}
TOKENS = {"token_file": "tokens"}


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "127.0.0.9:0", "[::1]:0"])
def test_loopback_needs_nothing(folder: Path, address: str) -> None:
    """Everybody there is local, and the names are known."""
    try:
        found = offered(Coordinator(address=address), folder)
    except ConfigError as error:
        pytest.skip(f"no such loopback address here: {error}") if "::1" in address else pytest.fail(
            str(error)
        )
    assert found.tokens is None
    assert {"localhost", "127.0.0.1", "[::1]", address.rpartition(":")[0]} <= found.hosts


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "tls_cert and tls_key"),
        (TOKENS, "tls_cert and tls_key"),
        (TLS, "token_file"),
        ({"tls": "terminated-upstream"}, "token_file"),
        (TOKENS | {"tls_cert": "chain.pem"}, "one of them is missing"),
        (TOKENS | TLS | {"tls": "terminated-upstream"}, "exclude each other"),
    ],
)
def test_any_other_address_needs_tls_and_tokens(
    folder: Path, address: str, settings: dict[str, str], said: str
) -> None:
    """Refused before anything is bound, with what is missing."""
    with pytest.raises(ConfigError, match=said):
        expose(Coordinator(address=address, **settings), folder, lambda: 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("tls", [TLS, {"tls": "terminated-upstream"}])
def test_with_both_it_is_offered(folder: Path, tls: dict[str, str]) -> None:
    """Under the names that are listed besides."""
    settings = Coordinator(address="0.0.0.0:0", hosts=("Fleet.example",), **TOKENS, **tls)  # type: ignore[arg-type]
    found = offered(settings, folder)
    assert isinstance(found.tokens, TokenBook)
    assert "fleet.example" in found.hosts


def test_what_cannot_be_used_is_told_in_one_line(folder: Path) -> None:
    """A port that is taken, a certificate that is none, an address that is none."""
    standing = expose(Coordinator(address="127.0.0.1:0"), folder, lambda: 0.0)
    port = standing.listener.getsockname()[1]
    with standing.listener, pytest.raises(ConfigError, match="cannot be used"):
        expose(Coordinator(address=f"127.0.0.1:{port}"), folder, lambda: 0.0)
    (folder / "bad.pem").write_text("nothing")
    for cert, key in [("bad.pem", "key.pem"), ("none.pem", "key.pem"), ("chain.pem", "authority.pem")]:
        with pytest.raises(ConfigError, match=r"\[coordinator\] tls_cert"):
            expose(Coordinator(address="127.0.0.1:0", tls_cert=cert, tls_key=key), folder, lambda: 0.0)
    with pytest.raises(ConfigError, match=r"\[coordinator\] address"):
        expose(Coordinator(address="no.such.host.invalid:1"), folder, lambda: 0.0)


# The command line


def test_a_token_is_printed_once_and_its_hash_kept(tmp_path: Path) -> None:
    """The file is for its owner alone, and the printed word opens what it says."""
    config = tmp_path / "fleet.toml"
    config.write_text("[coordinator]\ntoken_file = 'tokens'\n")
    words = [
        "--config",
        str(config),
        "coordinator",
        "token",
        "alice",
        "--role",
        "deployer",
        "--expires",
        "30",
    ]
    done = CliRunner().invoke(cli, [*words, "--routes", "digits,words"])

    assert done.exit_code == 0, done.output
    token = done.output.strip()
    assert token not in (tmp_path / "tokens").read_text()
    assert (tmp_path / "tokens").stat().st_mode & 0o777 == 0o600
    found = TokenBook(tmp_path / "tokens", lambda: 0).caller(token)
    assert found == Caller("alice", Role.DEPLOYER, frozenset({"digits", "words"}))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["Alice", "--role", "viewer"], "name role"),
        (["alice", "--role", "king"], "no role"),
        (["alice", "--role", "viewer", "--routes", "a/b"], "routes="),
        (["alice", "--role", "viewer", "--expires", "0"], "expires"),
    ],
)
def test_a_token_that_makes_no_sense_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    """In one line, and nothing is written."""
    config = tmp_path / "fleet.toml"
    config.write_text("[coordinator]\ntoken_file = 'tokens'\n")
    done = CliRunner().invoke(cli, ["--config", str(config), "coordinator", "token", *words])
    assert done.exit_code != 0
    assert said in done.output
    assert not (tmp_path / "tokens").exists()


def test_a_token_needs_a_file(tmp_path: Path) -> None:
    """The mend is named."""
    config = tmp_path / "fleet.toml"
    config.write_text("")
    words = ["--config", str(config), "coordinator", "token", "alice", "--role", "viewer"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 1
    assert "token_file" in done.output


def test_two_replicas_never_share_a_name() -> None:
    """Not even on one host, or one after the other."""
    assert holder_name() != holder_name()


def test_the_models_of_a_repository_are_told_with_what_is_wrong(tmp_path: Path) -> None:
    """A version that cannot be read does not hide the others, and no folder is named."""
    repository = Repository(tmp_path)
    source = tmp_path / "model.py"
    source.write_text("def load(folder): ...\n")
    settings = "".join(
        f"[[{kind}]]\nname = '{kind}'\ndatatype = 'FP32'\nshape = [1]\n" for kind in ("input", "output")
    )
    for version in ("1", "2"):
        repository.add("m", version, [source], runtime="python", settings=settings)
    (tmp_path / "m" / "2" / "manifest.json").write_text("{")
    (found,) = RepositoryView(repository).models()

    assert [(each.version, each.runtime) for each in found.versions] == [("1", "python"), ("2", "")]
    assert found.versions[0].digest == repository.fetch("m", "1").digest
    assert "model check" in found.versions[1].problem
    assert str(tmp_path) not in found.versions[1].problem


# The reference

REFERENCE = (Path(__file__).resolve().parents[2] / "docs" / "reference.md").read_text()


def test_the_reference_has_every_write_with_its_role() -> None:
    """And every path that is read."""
    section = REFERENCE.partition("## Coordinator API")[2].partition("\n## ")[0]
    for each in ENDPOINTS:
        last = each.path.rpartition("/")[2]
        if each.role is None or each.path == "/openapi.json":
            continue
        if each.method == "GET":
            assert f"`{each.path}`" in section or f"`/{last}`" in section, each.path
            continue
        row = next(line for line in section.splitlines() if line.startswith(f"| `{each.role.word}` |"))
        assert f"`{each.method} {each.path}`" in row or f"`/{last}`" in row, (each.method, each.path)


def test_the_reference_has_every_metric_of_a_coordinator() -> None:
    """Under the name that it is scraped by."""
    for family in CoordinatorMetrics("0").registry.collect():
        if family.name.startswith(PREFIX):
            name = family.name.removeprefix(PREFIX) + ("_total" if family.type == "counter" else "")
            assert f"| `{name}` |" in REFERENCE, name


# The dashboard


def test_the_dashboard_needs_nothing_from_elsewhere() -> None:
    """No address of another host, no script or style inside the page: it works under its own policy."""
    texts = {
        name: DASHBOARD.joinpath(name).read_text() for name in ("index.html", "dashboard.css", "dashboard.js")
    }
    for name, text in texts.items():
        without = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", without), name
    page = texts["index.html"]
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page)) == {"/dashboard.css", "/dashboard.js"}
    assert not re.search(r"<script(?![^>]*src)|<style|\son\w+=|style=", page)


def test_the_dashboard_sets_names_as_text() -> None:
    """Nothing that comes from outside becomes markup, code or a style."""
    script = DASHBOARD.joinpath("dashboard.js").read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(",
                ".style", "localStorage", "DOMParser", "createContextualFragment"):  # fmt: skip
        assert way not in script


def test_the_dashboard_is_sound_javascript() -> None:
    """As far as an engine can say without a page."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not here")
    with resources.as_file(DASHBOARD.joinpath("dashboard.js")) as path:
        text = path.read_bytes()
    done = subprocess.run(
        [node, "--input-type=module", "--check"], input=text, capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
