"""The rules for Prometheus: promtool accepts them, every alert has its cases and its page, names are real."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferfleet.telemetry.coordinator import CoordinatorMetrics
from inferfleet.telemetry.metrics import PREFIX, PrometheusMetrics
from tests.support.alert_rules import (
    PROMETHEUS,
    RUNBOOKS,
    alerts,
    hurried,
    hurried_rules,
    rule_files,
    rules,
)
from tests.support.prometheus import run_promtool

CASES = sorted((PROMETHEUS / "tests").glob("*.yaml"))
PAGES = sorted(page for page in RUNBOOKS.glob("*.md") if page.stem != "README")
OUTSIDE = {"up", "process_start_time_seconds"}
"""Metrics that are not the fleet's: Prometheus' own of a target, and the client library's."""

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_QUERIES = re.compile(r"^```promql\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_WORDS = {
    *("by", "on", "and", "or", "unless", "sum", "max", "min", "count", "avg", "rate", "increase", "time"),
    *("histogram_quantile", "last_over_time", "changes", "deriv", "offset", "ignoring", "group_left"),
}


def words_of(expression: str) -> set[str]:
    """Return the metrics and recorded series that an expression asks for."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression)
    bare = re.sub(r"\b(by|on|ignoring|group_left) \([^)]*\)", " ", bare)
    bare = re.sub(r"\boffset \w+", " ", bare)
    return {word for word in _NAME.findall(bare) if word not in _WORDS}


def queries(page: Path) -> list[str]:
    """Return the lines of a page's blocks of PromQL."""
    return [line for block in _QUERIES.findall(page.read_text()) for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def exposed() -> set[str]:
    """Every series that a worker or a coordinator may expose."""
    names: set[str] = set()
    for registry in (PrometheusMetrics("0", "w").registry, CoordinatorMetrics("0").registry):
        for family in registry.collect():
            if family.type == "counter":
                names.add(f"{family.name}_total")
            elif family.type == "histogram":
                names |= {family.name + suffix for suffix in ("_bucket", "_count", "_sum")}
            else:
                names.add(family.name)
    return names


def unknown(expressions: Iterable[str], exposed: set[str]) -> set[str]:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    return {word for each in expressions for word in words_of(each)} - exposed - recorded - OUTSIDE


def test_promtool_accepts_configuration_and_rules() -> None:
    done = run_promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))

    assert done.returncode == 0, done.stdout + done.stderr
    for file in rule_files():
        assert f"rules/{file.name}" in (PROMETHEUS / "prometheus.yml").read_text()


@pytest.mark.parametrize("file", CASES, ids=[file.stem for file in CASES])
def test_each_alert_fires_when_it_should_and_not_otherwise(file: Path) -> None:
    done = run_promtool("test", "rules", str(file))

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_is_quiet() -> None:
    assert {file.stem for file in CASES} == set(alerts())
    for file in CASES:
        tree: dict[str, Any] = yaml.safe_load(file.read_text())
        asked = [case for test in tree["tests"] for case in test["alert_rule_test"]]
        own = [case for case in asked if case["alertname"] == file.stem]
        assert any(case["exp_alerts"] for case in own), file
        quiet = [test for test in tree["tests"] if test["name"].startswith("quiet - ")]
        assert quiet, file


def test_every_alert_says_how_bad_it_is_and_where_its_page_stands() -> None:
    assert {page.stem for page in PAGES} == set(alerts())
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in {"critical", "warning"}, name
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"


def test_every_page_says_what_it_means_what_to_look_at_and_what_to_do() -> None:
    index = (RUNBOOKS / "README.md").read_text()
    for page in PAGES:
        severity = alerts()[page.stem]["labels"]["severity"]
        text = page.read_text()
        assert text.startswith(f"# {page.stem}\n\n{severity.capitalize()}. "), page
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
            "What it means",
            "What to look at",
            "What to do",
        ], page
        assert queries(page), page
        assert re.search(r"^(inferfleet|redis-cli) ", text, re.MULTILINE), page
        assert f"| [{page.stem}]({page.name}) | {severity} |" in index, page


def test_rules_and_pages_ask_only_for_what_the_processes_expose(exposed: set[str]) -> None:
    assert unknown([rule["expr"] for rule in rules()], exposed) == set()
    assert unknown([each for page in PAGES for each in queries(page)], exposed) == set()


def test_a_name_that_nobody_exposes_would_be_found(exposed: set[str]) -> None:
    asked = 'sum by (route) (rate(inferfleet_request_total{route="a"}[5m])) > route:inferfleet_nothing:sum'

    assert unknown([asked], exposed) == {"inferfleet_request_total", "route:inferfleet_nothing:sum"}
    assert f"{PREFIX}requests_total" in exposed


def test_the_queries_of_the_pages_can_be_asked(tmp_path: Path) -> None:
    asked = {each for page in PAGES for each in queries(page)}
    file = tmp_path / "queries.json"
    named = [{"record": f"query:{number}", "expr": each} for number, each in enumerate(sorted(asked))]
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": named}]}))

    done = run_promtool("check", "rules", str(file))

    assert done.returncode == 0, done.stdout + done.stderr


def test_hurried_rules_differ_in_durations_alone(tmp_path: Path) -> None:
    assert hurried("2m", 40) == "3000ms"
    assert hurried("increase(x:rate5m[30m])", 60) == "increase(x:rate5m[30000ms])"

    made = hurried_rules(tmp_path, 1)
    done = run_promtool("check", "rules", *map(str, made))

    assert done.returncode == 0, done.stdout + done.stderr
    written = [
        rule for file in made for group in json.loads(file.read_text())["groups"] for rule in group["rules"]
    ]
    for rule, committed in zip(written, rules(), strict=True):
        assert {key: rule.get(key) for key in ("alert", "record", "labels", "annotations")} == {
            key: committed.get(key) for key in ("alert", "record", "labels", "annotations")
        }
        assert words_of(rule["expr"]) == words_of(committed["expr"])
