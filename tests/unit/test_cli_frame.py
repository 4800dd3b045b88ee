"""The command's frame: late loading, common options, exit codes, errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from inferfleet.cli import cli
from inferfleet.cli.frame import LazyGroup, echo_table
from inferfleet.errors import ConfigError, InferfleetError

FLEET = """
[fleet]
name = "f"
[kafka.client]
"sasl.password" = "canary"
[redis]
url = "redis://u:canary@h/0"
"""
ROUTES = """
[[route]]
name = "digits"
source = "kafka:digits.requests"
results = ["kafka:digits.results", "redis"]
model = "digits"
variants = [ { name = "stable", version = "1", weight = 95 }, { name = "canary", version = "2", weight = 5 } ]
ttl_s = 60
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    (tmp_path / "fleet.toml").write_text(FLEET)
    (tmp_path / "routes.toml").write_text(ROUTES)
    return tmp_path / "fleet.toml"


def run(*arguments: object, env: dict[str, str] | None = None, code: int = 0) -> click.testing.Result:
    result = CliRunner().invoke(cli, [str(each) for each in arguments], env=env)
    assert result.exit_code == code, result.output
    return result


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every verb and its sub-verbs with the full name."""
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", each) for sub, each in command.commands.items())


def test_help_imports_no_engine_and_no_client() -> None:
    """--help is quick because it loads none of the verbs, nor what they need."""
    program = (
        "import sys\nfrom inferfleet.cli import cli\n"
        "cli(['--help'], standalone_mode=False)\n"
        "print([m for m in sys.modules if m in "
        "('torch', 'onnxruntime', 'confluent_kafka', 'numpy', 'redis', 'msgspec', 'structlog', 'rich')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"
    assert "doctor" in done.stdout


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_verb_has_an_example(name: str) -> None:
    """Help ends with a line that can be pasted."""
    assert "Example:" in run(*name.split(), "--help").output


@pytest.mark.parametrize(
    "name",
    ["config show", "route list", "route show", "topics plan", "dlt list", "dlt show", "doctor", "status"],
)
def test_every_verb_that_prints_data_has_json(name: str) -> None:
    """Scripts read JSON, people read text."""
    assert "--json" in run(*name.split(), "--help").output


@pytest.mark.parametrize(
    "arguments", [["--config", "{}", "config", "check"], ["config", "check", "--config", "{}"]]
)
def test_the_settings_may_be_named_before_or_behind_the_verb(fleet: Path, arguments: list[str]) -> None:
    """--config is one option in two places."""
    assert "fleet.toml: ok" in run(*[each.format(fleet) for each in arguments]).stdout


def test_the_settings_may_be_named_by_a_variable(fleet: Path) -> None:
    """$INFERFLEET_CONFIG stands for --config."""
    assert "1 routes" in run("config", "check", env={"INFERFLEET_CONFIG": str(fleet)}).stdout


def test_a_failure_is_one_line_and_1(tmp_path: Path) -> None:
    """What is wrong with the world exits 1."""
    result = run("--config", tmp_path / "none.toml", "route", "list", code=1)

    assert result.stderr == f"Error: config file {tmp_path / 'none.toml'} does not exist\n"


@pytest.mark.parametrize(
    "arguments", [["rout"], ["route", "show"], ["dlt", "show", "digits", "x"], ["--nothing"]]
)
def test_wrong_use_is_2(fleet: Path, arguments: list[str]) -> None:
    """What is wrong with the command line exits 2."""
    run(*arguments, env={"INFERFLEET_CONFIG": str(fleet)}, code=2)


def test_a_misspelt_verb_gets_the_nearest() -> None:
    """Suggestions are for verbs too."""
    assert 'no such verb "rout"; did you mean "route"?' in run("rout", code=2).stderr


@pytest.mark.parametrize("place", ["before", "behind"])
def test_debug_raises(tmp_path: Path, place: str) -> None:
    """With --debug the traceback is there to be read."""
    verb = ["config", "show", "--config", str(tmp_path / "none.toml")]
    arguments = ["--debug", *verb] if place == "before" else [*verb, "--debug"]

    assert isinstance(CliRunner().invoke(cli, arguments).exception, ConfigError)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InferfleetError("first\n  second"), "Error: first second\n"),
        (ValueError("odd"), "Error: ValueError: odd (not foreseen; --debug shows where)\n"),
    ],
)
def test_any_exception_becomes_one_line(error: Exception, said: str) -> None:
    """Foreign exceptions say that they were not foreseen."""
    group = LazyGroup("g", verbs={"fail": (f"{__name__}:failing", "Fails.")})
    failing.error = error  # type: ignore[attr-defined]
    result = CliRunner().invoke(group, ["fail"])

    assert (result.exit_code, result.stderr) == (1, said)


@click.command()
def failing() -> None:
    """Fail as told."""
    raise failing.error  # type: ignore[attr-defined]


def test_a_broken_pipe_is_left_to_click() -> None:
    """`inferfleet … | head` ends quietly."""
    group = LazyGroup("g", verbs={"fail": (f"{__name__}:failing", "Fails.")})
    failing.error = BrokenPipeError(32, "Broken pipe")  # type: ignore[attr-defined]

    assert CliRunner().invoke(group, ["fail"]).stderr == ""


def test_numbers_stand_right_and_texts_left(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns line up; nothing trails."""
    echo_table(("name", "count"), [("a", 5), ("long", 1000)])

    assert capsys.readouterr().out == "NAME  COUNT\na         5\nlong   1000\n"


def test_a_table_without_rows_is_its_headings(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty list is no error."""
    echo_table(("name",), [])

    assert capsys.readouterr().out == "NAME\n"


def test_config_show_gives_values_with_origins_and_no_secret(fleet: Path) -> None:
    """Text and JSON say the same."""
    env = {"INFERFLEET__BATCHING__MAX_BATCH_SIZE": "8"}
    text = run("--config", fleet, "config", "show", env=env).stdout
    shown = json.loads(run("--config", fleet, "config", "show", "--json", env=env).stdout)

    assert "canary" not in text + json.dumps(shown)
    assert shown["batching.max_batch_size"] == {"value": 8, "origin": "INFERFLEET__BATCHING__MAX_BATCH_SIZE"}
    assert shown["fleet.name"]["origin"] == str(fleet)
    assert shown["kafka.client.sasl.password"]["value"] == "***"
    assert '[kafka.client]\n"sasl.password" = "***"' in text
    assert "max_queue_delay_ms = 5 " in text


def test_config_check_reads_the_routes_too(fleet: Path) -> None:
    """A wrong route fails the check."""
    fleet.with_name("routes.toml").write_text(ROUTES.replace("ttl_s", "tll_s"))

    assert 'did you mean "ttl_s"' in run("--config", fleet, "config", "check", code=1).stderr


def test_routes_are_listed_and_shown(fleet: Path) -> None:
    """list is one line a route, show has the ranges, --toml what the file would hold."""
    listed = run("--config", fleet, "route", "list").stdout
    plain = json.loads(run("--config", fleet, "route", "show", "digits", "--json").stdout)
    toml = run("--config", fleet, "route", "show", "digits", "--toml").stdout

    assert "1 95%, 2 5%" in listed
    assert plain["variants"][1] == {
        "name": "canary",
        "version": "2",
        "weight": 5.0,
        "ranges": [[9500, 10000]],
    }
    assert "canary   2        5%     9500-9999" in run("--config", fleet, "route", "show", "digits").stdout
    assert toml.startswith('[[route]]\nname = "digits"\n')
    assert "ttl_s = 60" in toml
    assert json.loads(run("--config", fleet, "route", "list", "--json").stdout)["routes"] == [plain]
