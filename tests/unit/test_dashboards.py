"""The committed dashboards: as the code writes them, well formed, and about metrics that exist."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import CollectorRegistry

from inferfleet.telemetry.coordinator import CoordinatorMetrics
from inferfleet.telemetry.metrics import PrometheusMetrics
from tests.support.dashboards import FOLDER, NAMES, filled, load, panels, queries, variables
from tools import dashboards

WIDTH = 24
GRAFANAS = {"datasource", "__rate_interval", "__range", "__url_time_range", "__field"}
"""Variables that Grafana fills in by itself, or that name no series."""
UNITS = {value for name, value in vars(units).items() if not name.startswith("_") and isinstance(value, str)}
_SELECTOR = re.compile(r"([a-z_:][a-z0-9_:]*)(?:\{([^}]*)\})?(?=[\[\s)*+/-]|$)")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPING = re.compile(r"(?:by|on|group_left|group_right|ignoring|without) \(([^)]*)\)")
_STRING = re.compile(r'"[^"]*"')
TARGET_LABELS = {"job", "instance"}


def _labels(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Return the labels of each series that a registry may have, by its name as Prometheus stores it."""
    found: dict[str, set[str]] = {}
    for name, collector in registry._names_to_collectors.items():
        own = getattr(collector, "_labelnames", None)
        if own is None and hasattr(collector, "describe"):
            described = {each.name: getattr(each, "_labelnames", ()) for each in collector.describe()}
            own = described.get(re.sub("_(bucket|sum|count)$", "", name))
        found[name] = {*(own or ()), *TARGET_LABELS, *(["le"] if name.endswith("_bucket") else [])}
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, {*sample.labels, *TARGET_LABELS})
    return found


def _series() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"up": set(TARGET_LABELS)}
    for registry in (PrometheusMetrics("0", "w").registry, CoordinatorMetrics("0").registry):
        for name, labels in _labels(registry).items():
            found.setdefault(name, set()).update(labels)
    return found


SERIES = _series()


def _selectors(expr: str) -> list[tuple[str, set[str]]]:
    """Return the metrics that an expression names, each with the labels that it is asked by."""
    bare = _GROUPING.sub(" ", expr)
    found = []
    for name, matchers in _SELECTOR.findall(bare):
        if name.startswith(("inferfleet_", "process_", "python_")) or name in SERIES or matchers:
            found.append((name, set(_MATCHER.findall(_STRING.sub("", matchers)))))
    return found


def _kept(expr: str) -> set[str]:
    """Return the labels that groupings of an expression name, and those that it makes."""
    kept = {label.strip() for group in _GROUPING.findall(expr) for label in group.split(",")}
    made = re.findall(r'(?:count_values|label_replace)\(.*?"(\w+)"', expr)
    return (kept | set(made)) - {""}


def test_the_committed_files_are_what_the_code_writes(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was edited by hand, and two runs say the same."""
    assert dashboards.stale() == {}
    assert dashboards.main(["--check"]) == 0
    assert [make() for make in dashboards.DASHBOARDS.values()] == [
        make() for make in dashboards.DASHBOARDS.values()
    ]
    assert sorted(dashboards.DASHBOARDS) == NAMES
    assert dashboards.main(["--no"]) == 2
    assert "usage" in capsys.readouterr().err


def test_a_file_that_differs_is_named_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check names what is missing or was edited, and changes nothing."""
    monkeypatch.setattr(dashboards, "FOLDER", tmp_path / "new")
    assert dashboards.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert [name for name in NAMES if name not in said] == []
    assert not (tmp_path / "new").exists()
    assert dashboards.main([]) == 0
    (tmp_path / "new" / NAMES[0]).write_text("{}")
    assert dashboards.main(["--check"]) == 1
    assert NAMES[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_is_one_for_grafana(name: str) -> None:
    """The SDK's types read it and write the same again: no member is lost or misnamed."""
    register_default_plugins()
    board = load(name)
    again = json.loads(json.dumps(Dashboard.from_json(json.loads(json.dumps(board))), cls=JSONEncoder))
    for annotation in board["annotations"]["list"]:
        for ours in ("titleFormat", "step"):
            del annotation[ours]

    assert again == board
    assert board["schemaVersion"] >= 36
    assert "id" not in board
    assert (board["uid"], board["tags"]) == (f"inferfleet-{name.removesuffix('.json')}", ["inferfleet"])
    assert board["title"].startswith("inferfleet: ")
    assert board["description"].endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_panels_are_numbered_once_and_do_not_overlap(name: str) -> None:
    """Ids are unique, and no two panels share a cell of the grid, which is 24 wide."""
    board = load(name)
    ids = [each["id"] for each in board["panels"]]
    assert len(ids) == len(set(ids))
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH, panel["title"]
        columns = range(place["x"], place["x"] + place["w"])
        for cell in itertools.product(columns, range(place["y"], place["y"] + place["h"])):
            assert cell not in taken, (panel["title"], taken[cell])
            taken[cell] = panel["title"]
    filled_rows = {y for _, y in taken}
    assert filled_rows == set(range(max(filled_rows) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_says_what_it_shows_and_in_which_unit(name: str) -> None:
    """Each has a title, a description, a unit that Grafana knows, and the chosen data source."""
    board = load(name)
    for panel in panels(board):
        title = panel["title"]
        assert panel["description"].endswith("."), title
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, title
        assert panel["targets"], title
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, title
        refs = [each["refId"] for each in panel["targets"]]
        assert len(refs) == len(set(refs)), title
        if panel["type"] != "stat":
            assert all(each["legendFormat"] for each in panel["targets"]), title
    assert all(each["title"] for each in panels(board))
    sections = [each["title"] for each in board["panels"] if each["type"] == "row"]
    assert len(sections) == len(set(sections))


@pytest.mark.parametrize("name", NAMES)
def test_every_query_is_about_metrics_and_labels_that_exist(name: str) -> None:
    """A metric that was renamed, or a label that it lost, is found here and not on a dark screen."""
    known = GRAFANAS | variables(load(name)).keys()
    fills: Mapping[str, str] = dict.fromkeys(known, "5m")
    for asked in queries(name):
        expr = filled(asked.expr, fills)
        selectors = _selectors(expr)
        assert selectors, asked
        for metric, labels in selectors:
            assert metric in SERIES, asked
            assert labels <= SERIES[metric], asked
        there = set().union(*(SERIES[metric] for metric, _ in selectors))
        assert _kept(expr) - {"revision"} <= there, asked


@pytest.mark.parametrize("name", NAMES)
def test_legends_name_labels_that_a_query_keeps(name: str) -> None:
    """A legend that asks for a label which the grouping dropped would be empty."""
    for panel in panels(load(name)):
        for target in panel["targets"]:
            asked = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = _kept(target["expr"])
            if kept:
                assert asked <= kept | _own(target["expr"]), (panel["title"], target["legendFormat"])


def _own(expr: str) -> set[str]:
    """Return the labels of the series that reach the result unaggregated."""
    if re.search(r"\b(sum|max|min|avg|count|count_values)\b", expr):
        return set()
    return set().union(*(SERIES[metric] for metric, _ in _selectors(filled(expr, {"__rate_interval": "5m"}))))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_dashboards_that_exist(name: str) -> None:
    """Links inside panels name a dashboard of ours and variables that it has."""
    boards = {each["uid"]: each for each in map(load, NAMES)}
    board = load(name)
    for panel in panels(board):
        for link in panel["fieldConfig"]["defaults"].get("links", []):
            found = re.match(r"/d/([\w-]+)\?(.*)", link["url"])
            assert found is not None, link
            asked = set(re.findall(r"var-(\w+)=", found[2]))
            assert asked <= variables(boards[found[1]]).keys(), link
    assert [each["tags"] for each in board["links"]] == [["inferfleet"]]


def test_grafana_finds_them_where_the_compose_file_puts_them() -> None:
    """The data source has the name that is linked to; the folder and the home page are mounted where said."""
    deploy = FOLDER.parents[1]
    provisioning = deploy / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "inferfleet.yaml").read_text())["providers"]
    services = yaml.safe_load((deploy / "compose.yaml").read_text())["services"]
    mounted = dict(each.split(":")[:2] for each in services["grafana"]["volumes"])
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]

    assert (source["uid"], source["type"], source["isDefault"]) == ("prometheus", "prometheus", True)
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    assert mounted["./grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./grafana/provisioning"] == "/etc/grafana/provisioning"
    assert home == f"{provider['options']['path']}/fleet.json"
    scraped = yaml.safe_load((deploy / "prometheus" / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scraped["scrape_interval"]


def test_the_check_of_metrics_bites() -> None:
    """What this file takes expressions apart with sees names, matchers and groupings."""
    expr = 'sum by (route) (rate(inferfleet_requests_total{outcome!="a=b", route="x"}[5m])) * on (job) up'

    assert _selectors(expr) == [("inferfleet_requests_total", {"outcome", "route"}), ("up", set())]
    assert _kept(expr) == {"route", "job"}
    assert _selectors("sum(rate(inferfleet_nothing_total[5m]))") == [("inferfleet_nothing_total", set())]
