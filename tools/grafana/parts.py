"""The parts of a dashboard: queries, panels, variables, and how they are laid out and numbered.

What all dashboards share is decided here, so that they look and behave alike. Their queries use raw metrics
only: a dashboard works in a Grafana whose Prometheus has none of our recording rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import QueryEditorMode

SOURCE = dashboard.DataSourceRef("prometheus", "${datasource}")
TAG = "inferfleet"
RATE = "[$__rate_interval]"
WORKER = 'on (job, instance) group_left (worker) inferfleet_build_info{worker!=""}'
"""Gives the series of a worker's process the worker's name, whatever its job is called."""
HEIGHT = 8
STAT_HEIGHT = 4
GREEN, ORANGE, RED, BLUE, PURPLE, GREY = "green", "orange", "red", "blue", "purple", "text"

Steps = Sequence[tuple[float, str]]
Thing = timeseries.Panel | stat.Panel | statetimeline.Panel | heatmap.Panel
"""A panel that has no place and no number yet."""


class Query(NamedTuple):
    """One PromQL expression of a panel; ``legend`` is a template like ``{{route}}``.

    With ``exemplar`` Grafana also asks for the exemplars of its series, each of which names a trace.
    """

    expr: str
    legend: str = ""
    exemplar: bool = False


class Section(NamedTuple):
    """A row of a dashboard and the panels below it, in reading order."""

    title: str
    panels: Sequence[Thing]


class PrometheusAnnotation(dashboard.AnnotationQuery):
    """An annotation by a Prometheus expression, with the members that the SDK's type lacks."""

    def __init__(self, name: str, expr: str, title: str, color: str) -> None:
        super().__init__(name=name, datasource=SOURCE, icon_color=color, expr=expr)
        self.title = title

    def to_json(self) -> dict[str, object]:
        """Return the members of the SDK's type and ours."""
        return {**super().to_json(), "titleFormat": self.title, "step": "60s"}


_REVISIONS = PrometheusAnnotation(
    "Route revisions", "max(changes(inferfleet_route_revision[1m])) > 0", "A route changed", BLUE
)


def thresholds(steps: Steps, first: str = GREEN) -> builders.ThresholdsConfig:
    """Return thresholds: ``first`` from below, and each colour from its value on."""
    found = [dashboard.Threshold(None, first), *(dashboard.Threshold(value, color) for value, color in steps)]
    return builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(found)


def value_names(names: Mapping[int, tuple[str, str]]) -> list[dashboard.ValueMapping]:
    """Return the mapping of numbers to a text and a colour each."""
    results = {
        str(number): dashboard.ValueMappingResult(text=text, color=color, index=place)
        for place, (number, (text, color)) in enumerate(names.items())
    }
    return [dashboard.ValueMap(results)]


def series(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    span: int = 8,
    stacked: bool = False,
    limits: Steps = (),
    most: float | None = None,
    link: str = "",
) -> timeseries.Panel:
    """Return a panel of lines over time, from zero up.

    ``limits`` are drawn as dashed lines, ``most`` ends the axis, ``link`` is where a click on a series leads.
    """
    panel = timeseries.Panel().title(title).description(description).unit(unit).span(span).height(HEIGHT)
    panel = panel.datasource(SOURCE).min(0).line_width(1).fill_opacity(60 if stacked else 8)
    panel = panel.show_points(common.VisibilityMode.NEVER).span_nulls(False)
    panel = panel.thresholds(thresholds(limits))
    if limits:
        style = common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds_style(style)
    if stacked:
        panel = panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if most is not None:
        panel = panel.max(most)
    if link:
        panel = panel.data_links([builders.DashboardLink("Look at it").url(link)])
    legend = common_builders.VizLegendOptions().show_legend(True).calcs(["lastNotNull", "max"])
    legend = legend.display_mode(common.LegendDisplayMode.TABLE).placement(common.LegendPlacement.BOTTOM)
    tooltip = common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    panel = panel.legend(legend).tooltip(tooltip.sort(common.SortOrder.DESCENDING))
    for number, query in enumerate(queries):
        panel = panel.with_target(_target(number, query).range())
    return panel


def number(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    span: int = 3,
    limits: Steps = (),
    first: str = GREEN,
    names: Mapping[int, tuple[str, str]] | None = None,
    decimals: int | None = None,
    named: bool = False,
) -> stat.Panel:
    """Return a panel with the value of this moment, coloured by ``limits``.

    It is asked for this moment, not for the last value of a span: what is gone must not look as if it were
    there. ``names`` are texts in place of numbers; with ``named`` the legend is shown and not the number.
    """
    panel = stat.Panel().title(title).description(description).unit(unit).span(span).height(STAT_HEIGHT)
    panel = panel.datasource(SOURCE).thresholds(thresholds(limits, first)).no_value("none")
    panel = panel.graph_mode(common.BigValueGraphMode.NONE).color_mode(common.BigValueColorMode.VALUE)
    panel = panel.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    if names is not None:
        panel = panel.mappings(value_names(names))
    if named:
        panel = panel.text_mode(common.BigValueTextMode.NAME)
    if decimals is not None:
        panel = panel.decimals(decimals)
    return panel.with_target(_target(0, query).instant())


def states(
    title: str,
    description: str,
    *queries: Query,
    names: Mapping[int, tuple[str, str]],
    span: int = 8,
    unit: str = "none",
) -> statetimeline.Panel:
    """Return a panel that shows for each series when it was in which state; ``names`` has all states."""
    panel = statetimeline.Panel().title(title).description(description).unit(unit).span(span).height(HEIGHT)
    panel = panel.datasource(SOURCE).mappings(value_names(names)).show_value(common.VisibilityMode.AUTO)
    panel = panel.fill_opacity(70).merge_values(True)
    for place, query in enumerate(queries):
        panel = panel.with_target(_target(place, query).range())
    return panel


def quantile(share: float, histogram: str, matchers: str, *by: str) -> str:
    """Return the expression of a quantile: ``matchers`` choose series, ``by`` are the labels that stay."""
    labels = ", ".join([*by, "le"])
    chosen = f"{histogram}_bucket{{{matchers}}}" if matchers else f"{histogram}_bucket"
    return f"histogram_quantile({share:g}, sum by ({labels}) (rate({chosen}{RATE})))"


def _target(place: int, query: Query) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).ref_id(chr(ord("A") + place)).datasource(SOURCE)
    target = target.editor_mode(QueryEditorMode.CODE).legend_format(query.legend)
    return target.exemplar(True) if query.exemplar else target


def label_variable(
    name: str, label: str, description: str, query: str, *, many: bool = False
) -> builders.QueryVariable:
    """Return a variable whose values Prometheus has; with ``many`` several or all can be chosen."""
    variable = (
        builders.QueryVariable(name)
        .label(label)
        .description(description)
        .query({"query": query, "refId": f"variable-{name}"})
    )
    variable = variable.datasource(SOURCE).refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
    variable = variable.sort(dashboard.VariableSort.NATURAL_ASC)
    return variable.multi(True).include_all(True).all_value(".+") if many else variable


def page(
    uid: str,
    title: str,
    description: str,
    variables: Iterable[builders.QueryVariable],
    sections: Iterable[Section],
    annotations: Sequence[PrometheusAnnotation] = (),
) -> str:
    """Return a dashboard's JSON; panels are numbered and placed from left to right, section by section."""
    board = builders.Dashboard(title).uid(uid).description(description).tags([TAG]).timezone("browser")
    board = board.refresh("10s").time("now-30m", "now").tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
    source = builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    board = board.with_variable(source)
    for variable in variables:
        board = board.with_variable(variable)
    others = builders.DashboardLink("inferfleet").type(dashboard.DashboardLinkType.DASHBOARDS).tags([TAG])
    board = board.link(others.include_vars(True).keep_time(True))
    place = 0
    for section in sections:
        place += 1
        board = board.with_row(builders.Row(section.title).id(place))
        for panel in section.panels:
            place += 1
            board = board.with_panel(panel.id(place))
    built = board.build()
    built.annotations.list_val = [_REVISIONS, *annotations]
    return json.dumps(built, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
