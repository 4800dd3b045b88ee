"""Every call of a logger in the package: a fixed event name, and keys that mean one thing each."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import yaml

from inferfleet.tables import secret_name
from inferfleet.telemetry.vocabulary import CONTEXT, KEYS
from tools.log_index_template import index_template

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "workers" / "inferfleet"
LOGS = ROOT / "deploy" / "logs"
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
# What structlog and our own processors take out of a line before it is written.
TAKEN_OUT = {"exc_info", "private"}
# Where the name of an event comes from outside, because one class tells of several troubles.
NAMED_OUTSIDE = {"control/link.py", "patience.py", "coordinator/leading.py"}
# Where keys come from outside: parts of a path by their names here, a table that stands beside the call, and
# the demonstration's counts.
KEYED_OUTSIDE = {"coordinator/app.py", "coordinator/leading.py", "worker/failing.py", "demo/steady.py"}


class Call(NamedTuple):
    """One call of a logger."""

    file: str
    line: int
    node: ast.Call


def is_of_a_logger(node: ast.AST) -> bool:
    """Whether a node calls ``log.LEVEL(…)``, also one that is chosen between two levels."""
    if not isinstance(node, ast.Call):
        return False
    options = [node.func.body, node.func.orelse] if isinstance(node.func, ast.IfExp) else [node.func]
    return any(
        isinstance(each, ast.Attribute)
        and each.attr in LEVELS
        and isinstance(each.value, ast.Name)
        and each.value.id == "log"
        for each in options
    )


def calls() -> Iterator[Call]:
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text()
        if "structlog.get_logger" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if is_of_a_logger(node):
                assert isinstance(node, ast.Call)
                yield Call(str(path.relative_to(SOURCE)), node.lineno, node)


def test_the_walk_finds_the_calls() -> None:
    """The check is no formality."""
    assert len(list(calls())) > 90


def test_every_event_has_a_fixed_name() -> None:
    """In snake case, one positional argument, nothing put into it."""
    wrong = []
    for file, line, node in calls():
        name = node.args[0] if len(node.args) == 1 else None
        if isinstance(name, ast.Constant) and re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", str(name.value)):
            continue
        if file not in NAMED_OUTSIDE:
            wrong.append(f"{file}:{line}")
    assert wrong == []


def test_every_key_is_in_the_vocabulary() -> None:
    """A key that is not gets a name that stands there, or a place there of its own."""
    wrong = []
    for file, line, node in calls():
        for keyword in node.keywords:
            if keyword.arg is None:
                if file not in KEYED_OUTSIDE:
                    wrong.append(f"{file}:{line} **")
            elif keyword.arg not in KEYS.keys() | TAKEN_OUT or keyword.arg in CONTEXT:
                wrong.append(f"{file}:{line} {keyword.arg}")
    assert wrong == []


def test_no_key_is_masked() -> None:
    """A key that sounds like a secret would show only stars."""
    assert [key for key in KEYS if secret_name(key)] == []


def test_every_key_of_the_vocabulary_is_used_or_put_in() -> None:
    """What nothing says any more is taken out; who runs inside a span of a caller's may bind its id."""
    text = "".join(path.read_text() for path in SOURCE.rglob("*.py") if path.name != "vocabulary.py")
    unused = {key for key in KEYS if f"{key}=" not in text and f'"{key}"' not in text}
    assert unused <= {"span_id"}


def test_an_elastic_name_belongs_to_one_key() -> None:
    """Nor is one the beginning of another: an object cannot be a text too."""
    names = [key.name(name) for name, key in KEYS.items()]

    assert len(set(names)) == len(names)
    assert [(a, b) for a in names for b in names if b.startswith(f"{a}.")] == []


def test_the_page_has_every_key() -> None:
    """The how-to lists each key with its type and its name in Elastic's schema."""
    page = (ROOT / "docs" / "how-to" / "logs.md").read_text()
    rows = [f"| `{name}` | {key.type} | `{key.name(name)}` |" for name, key in KEYS.items()]

    assert [row for row in rows if row not in page] == []


def test_the_index_template_is_the_vocabulary() -> None:
    """What the cluster is told is what lines hold; a change of keys writes the file anew."""
    written = json.loads((LOGS / "index-template.json").read_text())

    assert written == index_template()
    assert written["template"]["mappings"]["properties"]["inferfleet"]["properties"]["batch"] == {
        "type": "long",
        "ignore_malformed": True,
    }


def test_the_other_shippers_read_what_processes_write() -> None:
    """Filebeat and Vector cannot be had where tests run: their files are held to names that must agree."""
    filebeat = yaml.safe_load((LOGS / "filebeat.yml").read_text())
    vector = yaml.safe_load((LOGS / "vector.yaml").read_text())
    (read,) = filebeat["filebeat.inputs"]
    index = filebeat["output.elasticsearch"]["index"]
    lines, loki = vector["transforms"]["lines"], vector["sinks"]["loki"]

    assert [name for each in read["parsers"] for name in each] == ["container", "ndjson"]
    assert fnmatch(index, index_template()["index_patterns"][0])
    assert f'searchIndex="{index}"' in (LOGS / "rsyslog.conf").read_text()
    assert (lines["inputs"], loki["inputs"]) == (["containers"], ["lines"])
    assert set(loki["labels"]) <= {"level", *CONTEXT}
