"""Write the Grafana dashboards of ``deploy/grafana/dashboards``, or check that they are as this code says.

python -m tools.dashboards            write what differs
python -m tools.dashboards --check    exit 1 and name what differs
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tools.grafana.fleet import fleet
from tools.grafana.rollout import rollout
from tools.grafana.route import route
from tools.grafana.versions import versions

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "dashboards"
DASHBOARDS: Mapping[str, Callable[[], str]] = {
    "fleet.json": fleet,
    "route.json": route,
    "rollout.json": rollout,
    "versions.json": versions,
}


def stale() -> dict[str, str]:
    """Return the right text of each file that is missing or says something else, by its name."""
    texts = {name: make() for name, make in DASHBOARDS.items()}
    return {name: text for name, text in texts.items() if _present(name) != text}


def _present(name: str) -> str:
    file = FOLDER / name
    return file.read_text(encoding="utf-8") if file.exists() else ""


def main(arguments: list[str]) -> int:
    """Write or check; return the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m tools.dashboards [--check]", file=sys.stderr)
        return 2
    wrong = stale()
    for name, text in wrong.items():
        if arguments:
            print(f"{name} is not what python -m tools.dashboards writes", file=sys.stderr)
        else:
            FOLDER.mkdir(parents=True, exist_ok=True)
            (FOLDER / name).write_text(text, encoding="utf-8")
            print(f"wrote {name}", file=sys.stderr)
    return 1 if arguments and wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
