"""The alert rules that are committed: read, and run through in seconds instead of minutes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PROMETHEUS = REPOSITORY / "deploy" / "prometheus"
RULES = PROMETHEUS / "rules"
RUNBOOKS = REPOSITORY / "docs" / "runbooks"

_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_DURATION = re.compile(r"(?<![\w.])(\d+)(ms|[smhdw])(?!\w)")


def rule_files() -> list[Path]:
    """Return the committed rule files, what is recorded before what alerts."""
    return [RULES / "recording.yaml", RULES / "alerts.yaml"]


def rules() -> Iterator[dict[str, Any]]:
    """Yield every rule as it stands in its file."""
    for file in rule_files():
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from group["rules"]


def alerts() -> dict[str, dict[str, Any]]:
    """Return the alert rules by name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def hurried(text: str, factor: float) -> str:
    """Return an expression or duration in which every duration is shorter by ``factor``.

    Durations are windows (``[5m]``), offsets and whole values such as ``2m``; numbers stay as they are.
    """

    def shorter(found: re.Match[str]) -> str:
        return f"{max(1, round(int(found[1]) * _UNITS_MS[found[2]] / factor))}ms"

    return _DURATION.sub(shorter, text)


def hurried_rules(folder: Path, factor: float) -> list[Path]:
    """Write the committed rules with every window, ``for`` and ``interval`` divided by ``factor``.

    Nothing else differs: names, conditions, labels and texts are those that are committed. Returns the
    files, which are JSON, and so YAML.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for file in rule_files():
        tree = yaml.safe_load(file.read_text())
        for group in tree["groups"]:
            if "interval" in group:
                group["interval"] = hurried(group["interval"], factor)
            for rule in group["rules"]:
                rule["expr"] = _hurried_expression(rule["expr"], factor)
                if "for" in rule:
                    rule["for"] = hurried(rule["for"], factor)
        made.append(folder / f"{file.stem}.json")
        made[-1].write_text(json.dumps(tree, indent=1))
    return made


def _hurried_expression(expression: str, factor: float) -> str:
    """Shorten windows and offsets, and not what is part of a name such as ``…:rate5m``."""
    windows = re.sub(r"\[[^\]]+\]", lambda found: hurried(found[0], factor), expression)
    return re.sub(r"\boffset \w+", lambda found: hurried(found[0], factor), windows)
