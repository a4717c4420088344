"""Charts as inline SVG: intervals by model, bars by category, losses by step.

A chart is drawn 360 units wide, so that its text stays legible on a telephone; the page puts as many side by side as
fit. Colours come from the page's style sheet by series number (``s0``, ``s1``, ...), which follows light and dark;
every series also has a marker shape of its own, and labels stand next to what they name.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as Xml

from markupsafe import Markup

from kdkit.report.html.axis import Axis
from kdkit.report.html.text import clean, shorten

__all__ = ["COLOURS", "Bar", "Dot", "Line", "bar_chart", "dot_chart", "line_chart"]

COLOURS: Final = 8
"""Colours in the style sheet; further series start again, told apart by their markers and labels."""

_WIDTH: Final = 360
_SHAPES: Final = (
    "M-4,0A4,4 0 1 0 4,0A4,4 0 1 0 -4,0Z",
    "M-3.6,-3.6H3.6V3.6H-3.6Z",
    "M0,-5L5,0L0,5L-5,0Z",
    "M0,-4.8L4.8,3.8H-4.8Z",
    "M0,4.8L4.8,-3.8H-4.8Z",
    "M-4.5,-1.5H-1.5V-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5Z",
    "M-5,0L0,-3L5,0L0,3Z",
    "M0,-5L3,0L0,5L-3,0Z",
)
_CHARACTER: Final = 6.4
"""Mean width of a character of the labels."""
_GAP: Final = 13.0
"""Least distance of labels at the ends of lines."""


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its interval; ``series`` is the colour, None for grey."""

    label: str
    text: str
    value: float
    ci95: tuple[float, float] | None
    series: int | None


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a group; ``tip`` is shown while the pointer is on it."""

    group: str
    tip: str
    value: float
    ci95: tuple[float, float] | None
    series: int


@dataclass(frozen=True, slots=True)
class Line:
    """A curve; None interrupts it. ``held_out`` draws it dashed, with a marker on every point."""

    label: str
    points: tuple[tuple[float, float | None], ...]
    series: int
    held_out: bool = False


def dot_chart(name: str, dots: Sequence[Dot], unit: str) -> Markup:
    """One row per dot: label, interval and value."""
    left = min(max(_width(dot.label) for dot in dots), 120.0) + 10
    right = min(max(_width(dot.text) for dot in dots), 96.0) + 10
    height, row = 22 * len(dots) + 8, 22
    svg = _canvas(name, height + 34)
    axis = _across(_covered(dots), left, _WIDTH - right)
    _vertical_grid(svg, axis, height, unit)
    for index, dot in enumerate(dots):
        y = row * index + row / 2 + 4
        group = Xml.SubElement(svg, "g", {"class": _series(dot.series)})
        _text(group, 0, y + 4, dot.label, room=left - 8, kind="label")
        if dot.ci95:
            _whisker(group, axis(dot.ci95[0]), axis(dot.ci95[1]), y)
        _marker(group, axis(dot.value), y, dot.series)
        _text(group, _WIDTH, y + 4, dot.text, anchor="end", kind="value", room=right)
    return _markup(svg)


def bar_chart(name: str, bars: Sequence[Bar], unit: str) -> Markup:
    """Horizontal bars from zero, in groups of one heading each."""
    groups: dict[str, list[Bar]] = {}
    for bar in bars:
        groups.setdefault(bar.group, []).append(bar)
    height = sum(26 + 11 * len(of) for of in groups.values())
    svg = _canvas(name, height + 34)
    axis = _across(_covered(bars), 8, _WIDTH - 12, zero=True)
    _vertical_grid(svg, axis, height, unit)
    top = 0.0
    for title, of in groups.items():
        _text(svg, 8, top + 17, title, room=_WIDTH - 20, kind="label")
        for index, bar in enumerate(of):
            _bar(svg, axis, bar, top + 22 + 11 * index)
        top += 26 + 11 * len(of)
    return _markup(svg)


def line_chart(name: str, lines: Sequence[Line], across: str, up: str) -> Markup:
    """Curves with their names at their ends."""
    right = min(max(_width(line.label) for line in lines), 110.0) + 14
    steps = [x for line in lines for x, _ in line.points]
    values = [y for line in lines for _, y in line.points if y is not None] or [0.0]
    svg = _canvas(name, 226)
    x = _across(steps, 40, _WIDTH - right, zero=True)
    y = Axis.over(values, 180, 22, most=6)
    _text(svg, 0, 11, up, kind="tick")
    for tick in y.ticks:
        _line(svg, x.start, y(tick), x.end, y(tick), "grid")
        _text(svg, x.start - 6, y(tick) + 4, y.label(tick), anchor="end", kind="tick")
    for tick in x.ticks:
        _line(svg, x(tick), 180, x(tick), 184, "axis")
        _text(svg, x(tick), 198, x.label(tick), anchor="middle", kind="tick")
    _text(svg, (x.start + x.end) / 2, 217, across, anchor="middle", kind="tick")
    for line in lines:
        _curve(Xml.SubElement(svg, "g", {"class": _series(line.series)}), x, y, line)
    _end_labels(svg, y, lines, x.end + 8, right - 10)
    return _markup(svg)


def _end_labels(svg: Xml.Element, y: Axis, lines: Sequence[Line], left: float, room: float) -> None:
    """One label per series, beside the end of its first curve."""
    ends: dict[int, tuple[str, float]] = {}
    for line in lines:
        last = next((value for _, value in reversed(line.points) if value is not None), y.ticks[0])
        ends.setdefault(line.series, (line.label, y(last)))
    tops = _apart([top for _, top in ends.values()], 14, 184)
    for (series, (label, _)), top in zip(ends.items(), tops, strict=True):
        _text(Xml.SubElement(svg, "g", {"class": _series(series)}), left, top + 4, label, room=room, kind="end")


def _curve(group: Xml.Element, x: Axis, y: Axis, line: Line) -> None:
    known = [(step, value) for step, value in line.points if value is not None]
    path, pen = [], "M"
    for step, value in line.points:
        if value is None:
            pen = "M"
            continue
        path.append(f"{pen}{_number(x(step))},{_number(y(value))}")
        pen = "L"
    Xml.SubElement(group, "path", {"class": "curve dashed" if line.held_out else "curve", "d": "".join(path)})
    # A single value has no line, and held-out values are few: both show as markers.
    if len(known) == 1 or (line.held_out and len(known) <= 40):
        for step, value in known:
            _marker(group, x(step), y(value), line.series, scale=0.8)


def _apart(positions: Sequence[float], low: float, high: float) -> list[float]:
    """The positions moved so far apart that labels at them do not overlap, between ``low`` and ``high``."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    placed = [0.0] * len(positions)
    before = low - _GAP
    for index in order:
        placed[index] = before = max(positions[index], before + _GAP)
    after = high + _GAP
    for index in reversed(order):
        placed[index] = after = min(placed[index], after - _GAP)
    return placed


def _across(values: Sequence[float], start: float, end: float, *, zero: bool = False) -> Axis:
    """A horizontal axis with as many ticks as its labels leave room for."""
    for most in (6, 5, 4, 3):
        axis = Axis.over(values, start, end, zero=zero, most=most)
        if max(_width(axis.label(tick)) for tick in axis.ticks) + 8 <= axis(axis.ticks[1]) - axis(axis.ticks[0]):
            break
    return axis


def _covered(marks: Iterable[Dot | Bar]) -> list[float]:
    return [value for mark in marks for value in (mark.value, *(mark.ci95 or ()))]


def _bar(svg: Xml.Element, axis: Axis, bar: Bar, y: float) -> None:
    group = Xml.SubElement(svg, "g", {"class": _series(bar.series)})
    Xml.SubElement(group, "title").text = clean(bar.tip)
    ends = sorted((axis(0), axis(bar.value)))
    box = {"x": ends[0], "y": y, "width": max(ends[1] - ends[0], 0.5), "height": 9.0}
    Xml.SubElement(group, "rect", {"class": "bar", **{key: _number(value) for key, value in box.items()}})
    if bar.ci95:
        _line(group, axis(bar.ci95[0]), y + 4.5, axis(bar.ci95[1]), y + 4.5, "whisker over")


def _vertical_grid(svg: Xml.Element, axis: Axis, height: float, unit: str) -> None:
    for tick in axis.ticks:
        _line(svg, axis(tick), 4, axis(tick), height, "grid")
        _text(svg, axis(tick), height + 14, axis.label(tick), anchor="middle", kind="tick")
    if unit:
        _text(svg, (axis.start + axis.end) / 2, height + 30, unit, anchor="middle", kind="tick")


def _whisker(parent: Xml.Element, x1: float, x2: float, y: float) -> None:
    _line(parent, x1, y, x2, y, "whisker")
    for x in (x1, x2):
        _line(parent, x, y - 3, x, y + 3, "whisker")


def _marker(parent: Xml.Element, x: float, y: float, series: int | None, *, scale: float = 1.0) -> None:
    shape = _SHAPES[(series or 0) % len(_SHAPES)]
    where = f"translate({_number(x)} {_number(y)})" + (f" scale({scale})" if scale < 1 else "")
    Xml.SubElement(parent, "path", {"class": "marker", "d": shape, "transform": where})


def _canvas(name: str, height: float) -> Xml.Element:
    size = f"0 0 {_WIDTH} {_number(height)}"
    return Xml.Element("svg", {"viewBox": size, "role": "img", "aria-label": clean(name)})


def _line(parent: Xml.Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    Xml.SubElement(parent, "line", {"class": kind, **{key: _number(value) for key, value in ends.items()}})


def _text(
    parent: Xml.Element, x: float, y: float, text: str, *, kind: str, anchor: str = "start", room: float = _WIDTH
) -> None:
    shown = _fitted(clean(text), room)
    attributes = {"x": _number(x), "y": _number(y), "class": kind}
    element = Xml.SubElement(parent, "text", attributes | ({"text-anchor": anchor} if anchor != "start" else {}))
    element.text = shown
    if shown != text:
        Xml.SubElement(parent, "title").text = clean(text[:300])


def _fitted(text: str, room: float) -> str:
    length = min(len(text), 200)
    while length > 2 and _width(shorten(text, length)) > room:
        length -= 1
    return shorten(text, length)


def _width(text: str) -> float:
    """An estimate that is rather too wide."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text[:200])
    return _CHARACTER * (min(len(text), 200) + wide)


def _series(series: int | None) -> str:
    return "grey" if series is None else f"s{series % COLOURS}"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"


def _markup(svg: Xml.Element) -> Markup:
    # ElementTree escapes all text and attributes.
    return Markup(Xml.tostring(svg, encoding="unicode"))  # noqa: S704
