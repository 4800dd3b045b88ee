"""What the committed dashboards ask Prometheus, with their variables filled in as Grafana would."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.prometheus import PrometheusServer

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "dashboards"
NAMES = sorted(each.name for each in FOLDER.glob("*.json"))
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
_LABEL_VALUES = re.compile(r"label_values\((.+), (\w+)\)")


class Asked(NamedTuple):
    """One query of a panel, as it is written, and where it stands; ``exemplar``: it wants exemplars too."""

    board: str
    panel: str
    expr: str
    instant: bool
    exemplar: bool = False

    def __str__(self) -> str:
        return f"{self.board}: {self.panel}: {self.expr}"


def load(name: str) -> dict[str, Any]:
    """Return a dashboard."""
    return dict(json.loads((FOLDER / name).read_text()))


def panels(board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that show something."""
    return [each for each in board["panels"] if each["type"] != "row"]


def variables(board: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the variables that Prometheus has the values of, by name."""
    return {each["name"]: each for each in board["templating"]["list"] if each["type"] == "query"}


def queries(name: str) -> Iterator[Asked]:
    """Yield every query of a dashboard's panels and annotations."""
    board = load(name)
    for panel in panels(board):
        for target in panel["targets"]:
            how = bool(target.get("instant")), bool(target.get("exemplar"))
            yield Asked(name, panel["title"], target["expr"], *how)
    for annotation in board["annotations"]["list"]:
        yield Asked(name, annotation["name"], annotation["expr"], False)


def filled(text: str, values: Mapping[str, str]) -> str:
    """Return ``text`` with its variables replaced; raise ``KeyError`` for one that nobody knows."""
    return _VARIABLE.sub(lambda found: values[found[1]], text)


def variable_values(
    server: PrometheusServer, variable: Mapping[str, Any], values: Mapping[str, str]
) -> list[str]:
    """Return what a variable may be, given those before it."""
    found = _LABEL_VALUES.fullmatch(filled(variable["query"]["query"], values))
    assert found is not None, variable["query"]
    asked = {"match[]": found[1]}
    return list(server.api(f"label/{found[2]}/values", **asked))
