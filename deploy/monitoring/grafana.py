"""Panels and dashboards as Grafana's JSON (schema of Grafana 10 and later)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from monitoring.series import is_declared

COLUMNS = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_HEIGHTS = {"row": 1, "stat": 4, "timeseries": 8, "heatmap": 10, "bargauge": 8, "table": 6}
OK_TO_BAD = ("green", "orange", "red")
BAD_TO_OK = ("red", "orange", "green")
PLAIN = ("blue", "blue", "blue")


@dataclass(frozen=True)
class Panel:
    """One panel. `targets` are (PromQL, legend) pairs; `limits` two values, coloured by `colours` from below.

    Lengths are in Grafana's grid of 24 columns.
    """

    title: str
    kind: str
    unit: str
    description: str
    targets: Sequence[tuple[str, str]]
    width: int = 12
    limits: tuple[float, float] = (0, 0)
    colours: tuple[str, str, str] = PLAIN
    maximum: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def height(self) -> int:
        """Rows of the grid."""
        return _HEIGHTS[self.kind]

    def declared(self) -> list[tuple[str, str]]:
        """The targets whose series exist in this version of the plugin."""
        return [target for target in self.targets if is_declared(target[0])]


@dataclass(frozen=True)
class Dashboard:
    """Panels in reading order. `variables` are Grafana's own models of them."""

    uid: str
    title: str
    description: str
    variables: Sequence[dict[str, Any]]
    panels: Sequence[Panel]

    def as_json(self) -> dict[str, Any]:
        """What Grafana imports. Panels without a series of this version are left out."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["vllm", "expert-prefetch"],
            "timezone": "browser",
            "editable": True,
            "graphTooltip": 1,
            "schemaVersion": 39,
            "version": 1,
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "templating": {"list": list(self.variables)},
            "annotations": {"list": []},
            "links": [],
            "panels": _placed(_shown(self.panels)),
        }


def row(title: str) -> Panel:
    """A heading."""
    return Panel(title, "row", "", "", (), COLUMNS)


def datasource_variable() -> dict[str, Any]:
    """The choice of the Prometheus server."""
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}


def label_variable(name: str, label: str, query: str, multiple: bool = True) -> dict[str, Any]:
    """A choice among the values of a label; `query` is label_values(...)."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 3,
        "multi": multiple,
        "includeAll": multiple,
        **({"allValue": ".*", "current": {"text": "All", "value": "$__all"}} if multiple else {}),
    }


def _shown(panels: Sequence[Panel]) -> list[Panel]:
    """Without panels that have nothing to show in this version, and without headings of nothing."""
    shown: list[Panel] = []
    for panel in panels:
        if panel.kind == "row" and shown and shown[-1].kind == "row":
            shown.pop()
        if panel.kind == "row" or panel.declared():
            shown.append(panel)
    return shown


def _placed(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """From left to right, in rows of the grid."""
    placed = []
    x = y = height = 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > COLUMNS:
            x, y, height = 0, y + height, 0
        position = {"x": x, "y": y, "w": panel.width, "h": panel.height}
        placed.append({"id": number, "gridPos": position, **_panel(panel)})
        x, height = x + panel.width, max(height, panel.height)
    return placed


def _panel(panel: Panel) -> dict[str, Any]:
    if panel.kind == "row":
        return {"type": "row", "title": panel.title, "collapsed": False, "panels": []}
    instant = panel.kind in ("table", "bargauge")
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
                "range": not instant,
                "instant": instant,
                **({"format": "table"} if panel.kind == "table" else {}),
            }
            for index, (expression, legend) in enumerate(panel.declared())
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": {**_OPTIONS.get(panel.kind, {}), **panel.options},
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    low, high = panel.limits
    colours = panel.colours
    steps: list[dict[str, Any]] = [{"value": None, "color": colours[0]}]
    if colours is not PLAIN:
        steps += [{"value": low, "color": colours[1]}, {"value": high, "color": colours[2]}]
    by_threshold = colours is not PLAIN and panel.kind in ("stat", "bargauge")
    return {
        "unit": panel.unit,
        "min": 0,
        **({"max": panel.maximum} if panel.maximum is not None else {}),
        "color": {"mode": "thresholds" if by_threshold else "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": _custom(panel),
    }


def _custom(panel: Panel) -> dict[str, Any]:
    if panel.kind != "timeseries":
        return {}
    style = "off" if panel.colours is PLAIN else "dashed"
    return {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "thresholdsStyle": {"mode": style}}


_REDUCE = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "lastNotNull"], "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": _REDUCE, "colorMode": "background", "graphMode": "area", "textMode": "value_and_name"},
    "bargauge": {"reduceOptions": _REDUCE, "orientation": "horizontal", "displayMode": "gradient"},
    "heatmap": {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "RdYlGn", "reverse": False, "steps": 64},
        "rowsFrame": {"layout": "auto"},
        "yAxis": {"axisPlacement": "left"},
        "legend": {"show": True},
        "cellGap": 1,
    },
    "table": {"showHeader": True},
}


def fill_in(expression: str, variables: dict[str, str], interval: str) -> str:
    """The PromQL of a panel as Grafana sends it: `variables` by name, `interval` for $__rate_interval."""
    values = {**variables, "__rate_interval": interval}
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], expression)
