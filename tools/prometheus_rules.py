"""Writes the rules of ``deploy/prometheus/rules`` as objects of the Prometheus operator, word for word.

python -m tools.prometheus_rules > deploy/kubernetes/components/prometheus-operator/rules.yaml
"""

from __future__ import annotations

import textwrap
from pathlib import Path

RULES = Path(__file__).resolve().parents[1] / "deploy" / "prometheus" / "rules"
_HEAD = """\
# Made by tools/prometheus_rules.py from deploy/prometheus/rules: change those.
"""
_OBJECT = """\
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: {name}
spec:
{spec}"""


def objects() -> str:
    """Return one PrometheusRule for each file of rules, as YAML."""
    made = [
        _OBJECT.format(name=path.stem, spec=textwrap.indent(path.read_text(), "  "))
        for path in sorted(RULES.glob("*.yaml"))
    ]
    return _HEAD + "".join(made)


if __name__ == "__main__":
    print(objects(), end="")
