"""`inferfleet model` as a shell uses it: adding, listing, showing, checking, trusting."""

from __future__ import annotations

import json
import tomllib

import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from inferfleet.cli import cli

HANDLER = """
class Model:
    def predict(self, tensors):
        return {"y": tensors["x"]}
"""
SETTINGS = """
input = [{name = "x", datatype = "FP32", shape = [4]}]
output = [{name = "y", datatype = "FP32", shape = [4]}]
[batching]
max_batch_size = 8
"""


class Shell:
    """Runs the command in a folder with settings, or with none."""

    def __init__(self, folder):
        self.folder = folder
        self.runner = CliRunner()

    def __call__(self, *words, settings=True):
        before = ["--config", str(self.folder / "fleet.toml")] if settings else []
        return self.runner.invoke(cli, [*before, "model", *words])

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
        return str(path)

    def trust(self, *entries):
        self.file("fleet.toml", f"[models]\ntrusted = {json.dumps(entries)}\n")


@pytest.fixture
def shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INFERFLEET_CONFIG", raising=False)
    made = Shell(tmp_path)
    made.trust()
    return made


@pytest.fixture
def onnx_path(shell):
    """A network from [n, 4] to [n, 4]."""

    def tensor(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4])

    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [tensor("x")], [tensor("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return shell.file("net.onnx", model.SerializeToString())


def add_handler(shell, version="1"):
    paths = shell.file("model.py", HANDLER), shell.file("words.toml", SETTINGS)
    return shell("add", "words", paths[0], "--version", version, "--settings", paths[1])


def test_an_added_onnx_model_is_listed_shown_and_passes_its_check(shell, onnx_path):
    """The whole way of a model that needs nothing but its file."""
    added = shell("add", "digits", onnx_path, "--version", "1")
    shown = shell("show", "digits")
    checked = shell("check")

    assert added.exit_code == 0, added.output
    assert added.output.startswith("added digits:1  onnx, net.onnx, 2 files")
    assert shell("list").output.splitlines()[1].split() == ["digits", "1"]
    assert [line.split() for line in shown.output.splitlines()[1:3]] == [
        ["input", "x", "FP32", "[4]"],
        ["output", "y", "FP32", "[4]"],
    ]
    assert (checked.exit_code, checked.output) == (0, "ok    digits:1\n")


def test_json_holds_what_the_text_shows(shell, onnx_path):
    """Every verb that prints data prints it for programs too."""
    added = json.loads(shell("add", "digits", onnx_path, "--version", "7", "--json").output)

    assert added["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [4]}]
    assert json.loads(shell("show", "digits:7", "--json").output) == added
    assert json.loads(shell("list", "--json").output) == [{"model": "digits", "versions": ["7"]}]
    assert json.loads(shell("check", "digits", "--json").output) == [
        {"model": "digits", "version": "7", "ok": True, "error": None}
    ]


def test_the_printed_line_is_what_trusts_the_code(shell):
    """A handler is refused until the very line of `model trust` stands under [models]."""
    added = add_handler(shell)
    refused = shell("check", "words:1")
    printed = shell("trust", "words").stdout
    shell.trust(*tomllib.loads(printed)["trusted"])
    passed = shell("check", "words:1")

    assert "`inferfleet model trust words:1`" in added.output
    assert refused.exit_code == 1
    assert refused.output.startswith("FAIL  words:1  ")
    assert "would run code" in refused.output
    assert (passed.exit_code, passed.output) == (0, "ok    words:1\n")
    assert shell("trust", "words").stdout == ""


def test_trust_keeps_the_entries_that_stand_there(shell):
    """The line can replace the one in the file."""
    shell.trust("other")
    add_handler(shell)
    entries = tomllib.loads(shell("trust", "words:1").stdout)["trusted"]

    assert entries[0] == "other"
    assert entries[1].startswith("words@sha256:")


def test_a_changed_version_fails_its_check_and_the_others_are_still_checked(shell, onnx_path):
    """One line for each, exit code 1 if any is refused."""
    shell("add", "digits", onnx_path, "--version", "1")
    shell("add", "digits", onnx_path, "--version", "2")
    with (shell.folder / "models/digits/1/net.onnx").open("ab") as file:
        file.write(b"\0")
    checked = shell("check", "digits", "--no-load")

    assert checked.exit_code == 1
    assert checked.output.splitlines()[0].startswith(
        "FAIL  digits:1  model digits version 1: net.onnx differs"
    )
    assert checked.output.splitlines()[1] == "ok    digits:2"


def test_a_repository_can_be_named_without_any_settings(shell, onnx_path):
    """`--repository` needs no fleet.toml; without one nothing is trusted."""
    (shell.folder / "fleet.toml").unlink()
    place = ("--repository", str(shell.folder / "elsewhere"))

    assert shell("add", "digits", onnx_path, "--version", "1", *place, settings=False).exit_code == 0
    assert shell("check", "digits:1", *place, settings=False).output == "ok    digits:1\n"
    assert (shell.folder / "elsewhere/digits/1/manifest.json").is_file()


def test_without_settings_the_way_out_is_named(shell, onnx_path):
    """Neither a fleet.toml nor a repository: one line says how to name either."""
    (shell.folder / "fleet.toml").unlink()
    said = shell("add", "digits", onnx_path, "--version", "1", settings=False)

    assert (said.exit_code, said.stderr.count("\n")) == (1, 1)
    assert "--repository, or a settings file by --config" in said.stderr


def test_a_repository_that_is_not_there_says_what_to_do(shell):
    """The settings may be of a machine whose models are elsewhere."""
    said = shell("list")

    assert said.exit_code == 1
    assert "models does not exist; set [models] repository, or run this where the models are" in said.stderr


def test_onnx_needs_no_trust(shell, onnx_path):
    """It runs no code, so nobody is sent to trust it; code that is not trusted says so."""
    shell("add", "digits", onnx_path, "--version", "1")
    add_handler(shell)
    onnx, code = (shell("show", name).output for name in ("digits", "words"))

    assert dict(line.split(None, 1) for line in onnx.splitlines()[1:])["trusted"] == "not needed"
    assert dict(line.split()[:2] for line in code.splitlines()[1:])["trusted"] == "no"


def test_batching_and_trust_are_shown(shell):
    """What the author wishes and whether code may run."""
    shell.trust("words")
    add_handler(shell)
    rows = dict(line.split()[:2] for line in shell("show", "words").output.splitlines()[1:])

    assert rows["max_batch_size"] == "8"
    assert rows["trusted"] == "yes"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "digitz"), 'model \'digitz\' is not in the repository'),
        (("show", "digits:9"), "model digits has no version '9'; there is: 1"),
        (("check", "nothing"), "is not in the repository"),
        (("add", "digits", "net.onnx", "--version", "1"), "exists; versions never change"),
        (("add", "other", "fleet.toml", "--version", "1"), "no main file is among the files"),
        (("add", "Digits", "net.onnx", "--version", "1"), "'Digits' is no model name"),
    ],
)  # fmt: skip
def test_a_failure_is_one_line_and_exit_code_1(shell, onnx_path, words, said):
    """The model at fault is named; there is no traceback."""
    shell("add", "digits", onnx_path, "--version", "1")
    failed = shell(*words)

    assert failed.exit_code == 1
    assert said in failed.stderr
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("add", "digits", "net.onnx"),
        ("add", "digits", "--version", "1"),
        ("add", "digits", "net.onnx", "--version", "01"),
        ("add", "digits", "gone.onnx", "--version", "1"),
        ("add", "digits", "net.onnx", "--version", "1", "--runtime", "caffe"),
        ("show", "digits:latest"),
        ("show", "digits:"),
        ("show",),
    ],
)
def test_wrong_use_is_exit_code_2(shell, onnx_path, words):
    """What can never work is told apart from what failed."""
    assert shell(*words).exit_code == 2


def test_an_empty_repository_says_so(shell):
    """No models is no failure; no folder is."""
    (shell.folder / "models").mkdir()

    assert shell("list").output.startswith("no models in ")
    assert shell("check").exit_code == 0
    (shell.folder / "models").rmdir()
    assert shell("list").exit_code == 1


@pytest.mark.parametrize("verb", ["add", "list", "show", "check", "trust"])
def test_every_verb_has_help_with_an_example(shell, verb):
    """`--help` shows how it is used."""
    assert "Example: inferfleet model" in shell(verb, "--help").output
