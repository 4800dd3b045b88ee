"""The prose is held to the code: links resolve, commands exist, snippets parse, tables name every key."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
import pytest

from inferfleet import routes
from inferfleet.cli import cli
from inferfleet.config import SECTIONS, Config, parse
from inferfleet.errors import RULES, Code, ConfigError
from inferfleet.models import description
from inferfleet.policies import parse_policy
from inferfleet.routes import parse_routes
from inferfleet.telemetry.metrics import PREFIX, PrometheusMetrics

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "schemas/*.md", "loadtest/*.md")
    for page in ROOT.glob(pattern)
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
REFERENCE = ROOT / "docs" / "reference.md"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_SEPARATORS = {"|", "||", "&&", "&", ";", "(", ")", ">", ">>", "<"}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found.groups()) for found in _FENCE.finditer(page.read_text())]


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings get."""
    text = _FENCE.sub("", page.read_text())
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in _HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_relative_link_resolves(page: Path) -> None:
    """A link leads to a file of the repository and, where it names one, to a heading in it."""
    wrong = []
    for target in _LINK.findall(_FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


def shell_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every ``inferfleet`` call in a block of shell."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        call: list[str] | None = None
        at_start = True
        for word in lexer:
            if word in _SEPARATORS:
                if call is not None:
                    yield call
                call, at_start = None, word not in (">", ">>", "<")
            elif call is not None:
                call.append(word)
            elif at_start and word == "inferfleet":
                call = []
            elif "=" not in word:
                at_start = False
        if call is not None:
            yield call


def check_call(words: list[str]) -> None:
    """Parse a command line as the command does, without running it; raises click's own error."""
    command: click.Command = cli
    context = click.Context(command, info_name="inferfleet")
    while True:
        parsed = command.make_context(context.info_name, list(words), parent=context.parent)
        if not isinstance(command, click.Group):
            return
        rest = [*parsed._protected_args, *parsed.args]
        if not rest and command.invoke_without_command:
            return
        name, found, words = command.resolve_command(parsed, rest)
        assert found is not None, name
        command, context = found, click.Context(found, info_name=name, parent=parsed)


def test_the_check_of_commands_bites() -> None:
    """An unknown verb or option in a page would be found."""
    calls = list(
        shell_commands("x=1 inferfleet status --admin a:1 | sort && inferfleet dlt lst digits # why")
    )

    assert calls == [["status", "--admin", "a:1"], ["dlt", "lst", "digits"]]
    check_call(calls[0])
    for wrong in (calls[1], ["status", "--admn", "a:1"], ["stats"]):
        with pytest.raises(click.UsageError):
            check_call(wrong)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_line_parses(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ``inferfleet`` line in a block of shell names a verb that exists, with options that it has."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language != "sh":
            continue
        for words in shell_commands(block.text):
            for word in words:
                if re.fullmatch(r"[\w./-]+\.\w+", word):
                    (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / word).touch()
            check_call(words)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_toml_snippet_parses(page: Path, tmp_path: Path) -> None:
    """A snippet is a sound ``fleet.toml``, ``routes.toml`` or ``model.toml``."""
    for block in blocks(page):
        if block.language != "toml":
            continue
        tree = tomllib.loads(block.text)
        if "step" in tree or "kind" in tree:
            assert parse_policy(block.text, page.name).hash
        elif "route" in tree:
            assert parse_routes(block.text, "inferfleet", page.name).routes
        elif "input" in tree:
            head = 'runtime = "python"\nfile = "model.py"\n' if "runtime" not in tree else ""
            description.parse((head + block.text).encode(), ["model.py", str(tree.get("file"))], page.name)
        else:
            for name in re.findall(r'_file" ?= ?"([^"]+)"|_file ?= ?"([^"]+)"', block.text):
                secret = tmp_path / (name[0] or name[1])
                secret.parent.mkdir(exist_ok=True)
                secret.write_text("secret\n")
            parse(block.text, base=tmp_path)


def rows(page: Path) -> set[str]:
    """Return the table rows of a page."""
    return {line.strip() for line in page.read_text().splitlines() if line.startswith("| ")}


def test_the_reference_has_every_setting_with_its_default() -> None:
    """Each key of ``fleet.toml`` stands in its section's table with the default that the code has."""
    text = REFERENCE.read_text()
    missing = []
    for name in SECTIONS:
        assert f"### `[{name}]`" in text
        section = getattr(Config(), name)
        body = text.partition(f"### `[{name}]`")[2].partition("\n#")[0]
        for key in section.__struct_fields__ if section is not None else ():
            row = f"| `{key}` | `{as_toml(getattr(section, key))}` |"
            if row not in body:
                missing.append(f"[{name}] {row}")
    assert missing == []


def as_toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(as_toml(each) for each in value)}]"
    return msgspec.json.encode(value).decode()


def test_the_reference_has_every_key_of_a_route() -> None:
    """Each key of ``[[route]]`` stands in the reference, with its default where it has one."""
    found = rows(REFERENCE)
    missing = []
    for field in msgspec.structs.fields(routes._RouteTable):
        default = "required" if field.required else "left out"
        if not field.required and field.default is not None:
            default = f"`{as_toml(field.default)}`"
        if not any(row.startswith(f"| `{field.name}` | {default} |") for row in found):
            missing.append(f"{field.name}: {default}")
    assert missing == []


def test_the_reference_has_every_code_and_its_rule() -> None:
    """Each error code stands in the reference with whose fault it is and whether a dead letter is kept."""
    found = rows(REFERENCE)
    for code in Code:
        rule = RULES[code]
        start = f"| `{code.value}` | {rule.fault} | {'yes' if rule.dead_letter else 'no'} |"
        assert any(row.startswith(start) for row in found), start


def test_the_reference_has_every_metric() -> None:
    """Each metric of a worker stands in the reference under the name that it is scraped by."""
    text = REFERENCE.read_text()
    families = [
        family for family in PrometheusMetrics("0", "w").registry.collect() if family.name.startswith(PREFIX)
    ]
    names = [
        each.name.removeprefix(PREFIX) + ("_total" if each.type == "counter" else "") for each in families
    ]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_a_snippet_with_a_wrong_key_would_be_found() -> None:
    """The check of snippets is no formality: an unknown key is an error."""
    with pytest.raises(ConfigError, match="bootstrap_servers"):
        parse('[kafka]\nbootstrap_server = "x"\n')
