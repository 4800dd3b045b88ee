"""Writes docs/contracts.md: which promise was shown for which adapter, from the results of the suites.

``contract_table.py suites`` prints the test files, ``contract_table.py write RESULTS.xml`` the page.
"""

from __future__ import annotations

import ast
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "contracts.md"
CONTRACTS = ROOT / "tests" / "contract"


class Suite(NamedTuple):
    """One port's suite: its file, what the port is, and the columns by parameter, as users name them."""

    file: str
    port: str
    adapters: dict[str, str]


_KAFKA = {"classic": "Kafka, classic", "consumer": "Kafka, KIP-848"}
_CONTROL = {"memory": "memory", "redis": "Redis", "cluster": "Redis Cluster"}
SUITES = (
    Suite(
        "test_intake_contract.py", "Taking (`Intake`)", {"memory": "memory", **_KAFKA, "rabbitmq": "RabbitMQ"}
    ),
    Suite("test_intake_defer.py", "Taking later (`Intake.defer`)", {"memory": "memory", **_KAFKA}),
    Suite("test_delayed_contract.py", "Retry topics (`DelayedIntake`)", {"memory": "memory", **_KAFKA}),
    Suite(
        "test_outlet_contract.py",
        "Publishing (`Outlet`)",
        {"memory": "memory", "kafka": "Kafka", "rabbitmq": "RabbitMQ"},
    ),
    Suite(
        "test_results_contract.py",
        "Results (`ResultOutlet`)",
        {"memory": "memory", "redis": "Redis", "redis-cluster": "Redis Cluster"},
    ),
    Suite("test_control_contract.py", "Pauses (`PauseBoard`)", {"local": "one process", "redis": "Redis"}),
    Suite("test_control_contract.py", "Crash marks (`CrashMarks`)", {"file": "file", "redis": "Redis"}),
    Suite("test_control_store.py", "The control plane's store (`ControlStore`)", _CONTROL),
    Suite("test_control_feed.py", "Following it (`RouteFeed`)", _CONTROL),
)


def promises(suite: Suite) -> dict[str, str]:
    """Return the tests of a suite that run for several adapters, in order, each with its first line."""
    tree = ast.parse((CONTRACTS / suite.file).read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            said = (ast.get_docstring(node) or node.name).split("\n\n")[0].replace("\n", " ")
            takes = {argument.arg for argument in node.args.args}
            if takes & _FIXTURES[next(iter(suite.adapters))]:
                found[node.name] = said
    return found


_FIXTURES = {
    "memory": {"bench", "store"},
    "local": {"board"},
    "file": {"life"},
}


def outcomes(results: Path) -> dict[tuple[str, str], dict[str, bool]]:
    """Return by file and test whether it passed with each parameter."""
    found: dict[tuple[str, str], dict[str, bool]] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        name, _, rest = case.get("name", "").partition("[")
        file = case.get("classname", "").rpartition(".")[2] + ".py"
        passed = not any(child.tag in ("failure", "error", "skipped") for child in case)
        for parameter in _adapters(rest.rstrip("]")):
            known = found.setdefault((file, name), {})
            known[parameter] = known.get(parameter, True) and passed
    return found


def _adapters(parameters: str) -> set[str]:
    """Return the adapters that a test's parameters name; one name holds a hyphen, which joins parameters."""
    known = {adapter for suite in SUITES for adapter in suite.adapters}
    return {parameters} if parameters in known else known.intersection(parameters.split("-"))


def page(results: Path, today: str) -> str:
    """Return the page's text."""
    seen = outcomes(results)
    lines = [
        "# What is promised, by adapter",
        "",
        "Written by `./scripts/contracts` from the results of the suites in `tests/contract/`, which run the",
        "same tests against every adapter and a real server behind it. `yes`: shown; `-`: the promise has no",
        f"meaning there (a queue has no offsets, a topic no channels). Last written {today}.",
    ]
    for suite in SUITES:
        lines += ["", f"## {suite.port}", "", _row(["promise", *suite.adapters.values()])]
        lines.append("|" + "---|" * (len(suite.adapters) + 1))
        for test, said in promises(suite).items():
            shown = seen.get((suite.file, test), {})
            cells = [_cell(shown, parameter) for parameter in suite.adapters]
            if any(cell != "-" for cell in cells):
                lines.append(_row([said, *cells]))
    return "\n".join(lines) + "\n"


def _cell(shown: dict[str, bool], parameter: str) -> str:
    return "-" if parameter not in shown else "yes" if shown[parameter] else "**no**"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(arguments: list[str]) -> int:
    """Print the suites, or write the page; 1 if a promise does not hold."""
    if arguments == ["suites"]:
        print(*dict.fromkeys(f"tests/contract/{suite.file}" for suite in SUITES))
        return 0
    if len(arguments) != 2 or arguments[0] != "write":
        print(__doc__, file=sys.stderr)
        return 2
    text = page(Path(arguments[1]), f"{datetime.now(UTC):%Y-%m-%d}")
    PAGE.write_text(text)
    print(f"{PAGE.relative_to(ROOT)}: {text.count('| yes')} times yes, {text.count('**no**')} times no")
    return 1 if "**no**" in text else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
