"""What Grafana's dashboard model (schema version 39) says of the parts that kvtier's dashboard has.

Written by hand, as strict as it can be: Grafana ignores what it does not know, so that a key with a typing error
would show in a browser only.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

Text = Annotated[str, Meta(min_length=1)]
Place = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(ge=1)]
Number = int | float
Calc = Literal["last", "lastNotNull", "mean", "min", "max", "sum"]
Unit = Literal["short", "s", "bytes", "Bps", "ops", "percentunit"]


class Part(Struct, rename="camel", forbid_unknown_fields=True, frozen=True):
    """A part of a dashboard: with all of these keys, and no other."""


class DataSource(Part):
    type: Literal["prometheus"]
    uid: Text


class GridPos(Part):
    x: Annotated[int, Meta(ge=0, le=23)]
    y: Place
    w: Annotated[int, Meta(ge=1, le=24)]
    h: Size


class Step(Part):
    color: Literal["text", "green", "yellow", "red"]
    value: Number | None


class Thresholds(Part):
    mode: Literal["absolute"]
    steps: Annotated[list[Step], Meta(min_length=1)]


class MappedText(Part):
    text: Text


class Mapping(Part):
    type: Literal["value"]
    options: dict[str, MappedText]


class Stacking(Part):
    group: Text
    mode: Literal["none", "normal", "percent"]


class Curve(Part):
    draw_style: Literal["line", "bars", "points"]
    line_width: Annotated[int, Meta(ge=0, le=10)]
    fill_opacity: Annotated[int, Meta(ge=0, le=100)]
    show_points: Literal["auto", "never", "always"]
    stacking: Stacking


class ValueField(Part):
    unit: Unit
    thresholds: Thresholds
    mappings: list[Mapping]


class CurveField(ValueField):
    min: Number
    custom: Curve


class ValueFields(Part):
    defaults: ValueField
    overrides: Annotated[list[Any], Meta(max_length=0)]


class CurveFields(Part):
    defaults: CurveField
    overrides: Annotated[list[Any], Meta(max_length=0)]


class Reduce(Part):
    calcs: Annotated[list[Calc], Meta(min_length=1)]
    fields: str
    values: bool


class StatOptions(Part):
    reduce_options: Reduce
    color_mode: Literal["value", "background", "background_solid", "none"]
    graph_mode: Literal["none", "line", "area"]
    justify_mode: Literal["auto", "center"]
    text_mode: Literal["auto", "value", "value_and_name", "name", "none"]
    orientation: Literal["auto", "vertical", "horizontal"]
    wide_layout: bool
    show_percent_change: bool
    percent_change_color_mode: Literal["standard", "inverted", "same_as_value"]


class Legend(Part):
    display_mode: Literal["list", "table", "hidden"]
    placement: Literal["bottom", "right"]
    show_legend: bool
    calcs: list[Calc]


class Tooltip(Part):
    mode: Literal["single", "multi", "none"]
    sort: Literal["asc", "desc", "none"]


class CurveOptions(Part):
    legend: Legend
    tooltip: Tooltip


class Target(Part):
    ref_id: Annotated[str, Meta(pattern="^[A-Z]$")]
    datasource: DataSource
    expr: Text
    legend_format: Text
    instant: bool
    range: bool


class Row(Part, tag_field="type", tag="row"):
    id: Size
    title: Text
    collapsed: Literal[False]
    grid_pos: GridPos
    # Those of a row that is shut; an open one's follow it.
    panels: Annotated[list[Any], Meta(max_length=0)]


class Stat(Part, tag_field="type", tag="stat"):
    id: Size
    title: Text
    description: Text
    datasource: DataSource
    grid_pos: GridPos
    field_config: ValueFields
    options: StatOptions
    targets: Annotated[list[Target], Meta(min_length=1)]


class TimeSeries(Part, tag_field="type", tag="timeseries"):
    id: Size
    title: Text
    description: Text
    datasource: DataSource
    grid_pos: GridPos
    field_config: CurveFields
    options: CurveOptions
    targets: Annotated[list[Target], Meta(min_length=1)]


class ChosenSource(Part):
    selected: bool
    text: Text
    value: Text


class ChosenValues(Part):
    selected: bool
    text: list[Text]
    value: list[Text]


class VariableQuery(Part):
    query: Text
    ref_id: Text


class SourceVariable(Part, tag_field="type", tag="datasource"):
    name: Text
    label: Text
    query: Literal["prometheus"]
    current: ChosenSource
    hide: Literal[0, 1, 2]
    refresh: Literal[0, 1, 2]
    regex: str


class LabelVariable(Part, tag_field="type", tag="query"):
    name: Text
    label: Text
    datasource: DataSource
    query: VariableQuery
    current: ChosenValues
    include_all: bool
    all_value: Text
    multi: bool
    hide: Literal[0, 1, 2]
    refresh: Literal[0, 1, 2]
    sort: Annotated[int, Meta(ge=0, le=8)]


class Variables(Part, rename={"items": "list"}):
    items: list[SourceVariable | LabelVariable]


class Annotations(Part, rename={"items": "list"}):
    items: Annotated[list[Any], Meta(max_length=0)]


class TimeRange(Part, rename={"from_": "from"}):
    from_: Annotated[str, Meta(pattern=r"^now(-\d+[smhdwMy])?$")]
    to: Literal["now"]


class Dashboard(Part):
    uid: Annotated[str, Meta(min_length=1, max_length=40, pattern="^[A-Za-z0-9_-]+$")]
    title: Text
    description: Text
    tags: list[Text]
    schema_version: Literal[39]
    version: Size
    editable: bool
    graph_tooltip: Literal[0, 1, 2]
    time: TimeRange
    refresh: Annotated[str, Meta(pattern=r"^\d+[smhd]$")]
    timezone: Literal["", "browser", "utc"]
    annotations: Annotations
    links: Annotated[list[Any], Meta(max_length=0)]
    templating: Variables
    panels: Annotated[list[Row | Stat | TimeSeries], Meta(min_length=1)]
