"""The page: header, charts, pictures, settings, in one HTML document."""

from __future__ import annotations

import base64
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from sde.reporting import settings
from sde.reporting.drawing import COLORS, describe, draw_chart, draw_map
from sde.reporting.html import Markup, data_block, element, table
from sde.reporting.media import Gallery, Picture
from sde.reporting.record import Record
from sde.reporting.series import (
    SMOOTHING,
    Chart,
    Levels,
    Series,
    charts,
    clock,
    evaluation_charts,
    level_charts,
    read_levels,
)

_HERE = Path(__file__).parent


def make_page(records: Sequence[Record], galleries: Sequence[Gallery], composed: Mapping[str, Any]) -> str:
    """The document.

    Args:
        records: the runs.
        galleries: the pictures of each.
        composed: the configuration that a run without any options has.
    """
    families = [levels for number, record in enumerate(records) for levels in read_levels(record, number)]
    trained, by_level, evaluated = _distinct(
        charts(records), level_charts(families, records), evaluation_charts(records)
    )
    maps = [levels for levels in families if len(levels.steps) > 1 and len(levels.centers) > 1]
    content = [
        _header(records),
        _tools(records) if trained else Markup(""),
        _curves(records, trained),
        _noise_levels(records, by_level, maps),
        _samples(records, galleries),
        _evaluations(records, galleries, evaluated),
        _settings(records, composed),
        _footer(records),
        data_block("data", _payload(records, [*trained, *by_level, *evaluated], maps)),
    ]
    return _document(" and ".join(record.name for record in records), content)


def _distinct(*groups: Sequence[Chart]) -> list[list[Chart]]:
    """The charts with keys that no other has: a name may be recorded by training and by an evaluation."""
    taken = set[str]()
    result: list[list[Chart]] = []
    for group in groups:
        result.append([])
        for chart in group:
            key = next(k for n in count() if (k := f"{chart.key}{f'-{n + 1}' if n else ''}") not in taken)
            taken.add(key)
            result[-1].append(replace(chart, key=key))
    return result


def _document(title: str, content: Sequence[str]) -> str:
    style, script = (Markup((_HERE / name).read_text()) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title}: report"),
        element("style", style),
    )
    body = element("body", element("main", *content), element("script", script))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# What the script reads


def _payload(records: Sequence[Record], shown: Sequence[Chart], maps: Sequence[Levels]) -> dict[str, Any]:
    return {
        "smoothing": SMOOTHING,
        "clocks": [clock(record) for record in records],
        "charts": [
            {key: getattr(chart, key) for key in ("key", "x", "log", "zero")}
            | {"label": describe(chart), "series": [_series(series) for series in chart.series]}
            for chart in shown
        ],
        "maps": [_map(levels) for levels in maps],
    }


def _series(series: Series) -> dict[str, Any]:
    known = {key: getattr(series, key) for key in ("label", "run", "color", "dashed", "faint", "smooth", "x")}
    means = {} if series.mean is None or not series.smooth else {"mean": _digits(series.mean, 5)}
    return known | {"y": _digits(series.y, 6)} | means


def _map(levels: Levels) -> dict[str, Any]:
    steps, rows = levels.columns()
    plain = [[None if value is None or math.isnan(value) else value for value in row] for row in rows]
    return {
        "key": _map_key(levels),
        "centers": levels.centers,
        "steps": steps,
        "rows": [_digits(row, 4) for row in plain],
    }


def _map_key(levels: Levels) -> str:
    return f"map-{levels.run}-{levels.name}"


def _digits(values: Sequence[float | None], digits: int) -> list[float | None]:
    return [None if value is None else float(f"{value:.{digits}g}") for value in values]


# Header


def _header(records: Sequence[Record]) -> Markup:
    if len(records) > 1:
        names = [record.name for record in records]
        facts = [dict(_facts(record)) for record in records]
        labels = list(dict.fromkeys(label for known in facts for label in known))
        rows = [[label, *(known.get(label, settings.MISSING) for known in facts)] for label in labels]
        return element("header", element("h1", f"{len(records)} runs"), table(["", *names], rows, "Where they are"))
    (record,) = records
    cards = [
        element("div", element("dt", label), element("dd", *_with_small(value))) for label, value in _facts(record)[1:]
    ]
    commands = [
        element("p", element("span", what, class_="quiet"), element("code", line)) for what, line in record.commands()
    ]
    return element(
        "header",
        element("h1", record.name, " ", element("span", record.state, class_=f"state {record.state}")),
        element("p", parts_of(record)),
        element("dl", *cards, class_="facts"),
        element("div", *commands, class_="commands"),
    )


def _with_small(value: str) -> list[str]:
    """What stands in brackets at the end goes below in small letters."""
    first, bracket, rest = value.partition(" (")
    return [first, element("br"), element("small", rest.removesuffix(")"))] if bracket else [value]


def parts_of(record: Record) -> str:
    """SDE, parameterization, model, data and so on in one line."""
    config, data = record.config, record.data
    shape = data.get("shape")
    shape = "×".join(map(str, shape)) if isinstance(shape, list) else ""
    size = f" ({shape}, {data['num_classes']} classes)" if data.get("num_classes") else f" ({shape})" if shape else ""
    steps = config.get("preview_steps")
    schedule = record.part("schedule")
    return " · ".join(
        [
            record.part("sde"),
            f"{record.part('parameterization')} parameterization",
            f"{record.part('model')}{', told the class' if config.get('conditional') else ''}",
            f"{record.part('data')}{size}",
            f"{record.part('loss')} loss",
            f"{record.part('optimizer')}{f', {schedule} schedule' if schedule != '-' else ''}",
            f"previews by {record.part('preview_solver')}{f' in {steps} steps' if steps else ''}",
        ]
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    """(what, value) of the state of a run; what is not known is left out."""
    facts = [("State", record.state), ("Step", f"{record.step:,}" + (f" of {record.steps:,}" if record.steps else ""))]
    facts.append(("Trained", duration(record.seconds)))
    speed = record.newest("train/pictures_per_second")
    if record.state == "running" and record.seconds_to_go is not None:
        facts.append(("To go, about", duration(record.seconds_to_go)))
    for label, name in (("Loss", "train/loss"), ("Validation loss", "val/loss")):
        value = record.newest(name)
        best = record.best(name) if name == "val/loss" else None
        if value is not None:
            least = f" (least {best[1]:.4g} at {best[0]:,})" if best and best[1] < value else ""
            facts.append((label, f"{value:.4g}{least}"))
    if speed is not None:
        facts.append(("Throughput", f"{speed:,.4g} pictures/s" if speed < 1e4 else f"{speed:,.0f} pictures/s"))
    memory = record.newest("train/memory_gib")
    if memory is not None:
        facts.append(("Peak memory", f"{memory:.3g} GiB"))
    if record.newest("train/skipped"):
        facts.append(("Skipped steps", f"{record.newest('train/skipped'):g}"))
    if record.parameters is not None:
        facts.append(("Parameters", f"{record.parameters / 1e6:.3g} M"))
    if record.environment.get("device"):
        facts.append(("Device", str(record.environment["device"])))
    return facts


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    for unit, name, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            rest = int(seconds % unit // part)
            return f"{int(seconds // unit)} {name}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds:.0f} s" if seconds >= 10 or seconds == 0 else f"{seconds:.1f} s"


# Charts


def _tools(records: Sequence[Record]) -> Markup:
    options = [element("option", "step", value="step"), element("option", "time", value="time")]
    return element(
        "div",
        element("label", "along the axis ", element("select", *options, id="x")),
        element("label", "from ", element("input", type="number", id="from", min=0, step="any")),
        element("label", "to ", element("input", type="number", id="to", min=0, step="any")),
        element(
            "label",
            "smoothing over ",
            element("input", type="range", id="smooth", min=0, max=0.2, step=0.005, value=SMOOTHING),
            element("output", f"{100 * SMOOTHING:g} %", id="smooth-share", for_="smooth"),
        ),
        element("button", "show all", type="button", id="reset"),
        element("span", "drag over a chart to zoom; arrow keys read it", class_="quiet"),
        class_="tools",
        role="group",
        aria_label="Charts",
    )


def _note(text: str) -> Markup:
    return element("p", text, class_="note")


def _curves(records: Sequence[Record], trained: Sequence[Chart]) -> Markup:
    silent = [record.name for record in records if not record.training]
    notes = [
        _note(f"{name} has no line of metrics yet: the first comes after training.log_every steps.") for name in silent
    ]
    figures = [_figure(chart) for chart in trained]
    return element("section", element("h2", "Training"), *notes, element("div", *figures, class_="charts"))


def _figure(chart: Chart) -> Markup:
    legend = [
        element(
            "li",
            element("i", class_=f"c{series.color % COLORS}{' dashed' * series.dashed}{' faint' * series.faint}"),
            f"{series.label} ",
            element("span", _last(series), class_="value"),
        )
        for series in chart.series
    ]
    button = element(
        "button", "log", type="button", class_="script", aria_pressed=str(chart.log).lower(),
        aria_label=f"logarithmic axis for {chart.title}", disabled=not chart.positive,
    )  # fmt: skip
    unit = [element("small", f" {chart.unit}")] if chart.unit else []
    plot = element("div", draw_chart(chart), class_="plot", tabindex=0, role="group", aria_label=chart.title)
    return element(
        "figure",
        element("figcaption", element("h3", chart.title, *unit), button),
        plot,
        element("ul", *legend, class_="legend"),
        element("p", class_="at script"),
        class_="chart",
        data_key=chart.key,
    )


def _last(series: Series) -> str:
    last = next((y for y in reversed(series.y) if y is not None), None)
    return "not finite" if last is None else f"{last:.4g}"


def _noise_levels(records: Sequence[Record], by_level: Sequence[Chart], maps: Sequence[Levels]) -> Markup:
    if not by_level:
        return Markup("")
    figures = [_figure(chart) for chart in by_level]
    for levels in maps:
        owner = f"{records[levels.run].name}: " if len(records) > 1 else ""
        title = f"{owner}{levels.name} over training"
        plot = element("div", draw_map(levels), class_="plot", tabindex=0, role="group", aria_label=title)
        figures.append(
            element(
                "figure",
                element("figcaption", element("h3", title)),
                plot,
                element("p", class_="at script", aria_live="polite"),
                class_="chart",
                data_key=_map_key(levels),
            )
        )
    explained = "log SNR = log(alpha²/sigma²), signal to noise: little noise on the right, and above in the maps."
    return element(
        "section", element("h2", "By noise level"), _note(explained),
        element("div", *figures, class_="charts"),
    )  # fmt: skip


# Pictures


def _samples(records: Sequence[Record], galleries: Sequence[Gallery]) -> Markup:
    notes = [_note(note) for gallery in galleries for note in gallery.notes]
    steps = sorted({picture.step for gallery in galleries for picture in gallery.previews})
    if not steps:
        none = _note("There are no previews yet: training.preview_every sets how often they are drawn.")
        return element("section", element("h2", "Samples over training"), none, *notes)
    last = len(steps) - 1
    slider = element(
        "label", "step ",
        element(
            "input", type="range", id="preview", min=0, max=last, value=last, disabled=last == 0,
            data_steps=" ".join(map(str, steps)),
        ),
        element("output", str(steps[-1]), id="preview-step", for_="preview"),
        class_="slider script",
    )  # fmt: skip
    parts = []
    for record, gallery in zip(records, galleries, strict=True):
        shown = [element("h3", record.name)] if len(records) > 1 else []
        strip = [_preview(picture, record) for picture in reversed(gallery.previews)]
        shown.append(element("div", *strip, class_="strip"))
        if gallery.animation is not None:
            step = gallery.animation.step
            moving = _image(gallery.animation, f"Animation from noise to the samples of {record.name} at step {step}")
            title = element("summary", f"From noise to data, step {step:,}")
            shown.append(element("details", title, moving, open=True, class_="animation"))
        parts.append(element("section", *shown))
    return element(
        "section", element("h2", "Samples over training"), slider, element("div", *parts, class_="galleries"), *notes
    )


def _preview(picture: Picture, record: Record) -> Markup:
    image = _image(picture, f"Samples of {record.name} at step {picture.step}")
    return element("figure", image, element("figcaption", f"step {picture.step:,}"), data_step=picture.step)


def _image(picture: Picture, text: str) -> Markup:
    width, height = picture.size
    return element("img", src=picture.uri(), alt=text, width=width, height=height, decoding="async")


def _evaluations(records: Sequence[Record], galleries: Sequence[Gallery], evaluated: Sequence[Chart]) -> Markup:
    """Numbers that commands added to the record later, and the newest pictures that they drew."""
    parts: list[Markup] = []
    if any(record.evaluations for record in records):
        parts.append(_evaluation_table(records))
    parts.append(element("div", *(_figure(chart) for chart in evaluated), class_="charts"))
    drawn = []
    for record, gallery in zip(records, galleries, strict=True):
        for picture in gallery.others:
            where = picture.path.relative_to(record.path)
            caption = f"{picture.title}: {record.name}/{where}"
            drawn.append(element("figure", _image(picture, caption), element("figcaption", caption)))
    parts.append(element("div", *drawn, class_="galleries"))
    if not drawn and not any(record.evaluations for record in records):
        return Markup("")
    return element("section", element("h2", "Evaluations and samples"), *parts)


def _evaluation_table(records: Sequence[Record]) -> Markup:
    """A row for each line that an evaluation wrote: what all its names begin with, and its values."""
    rows, columns = [], list[str]()
    for record in records:
        for line in record.evaluations:
            known = {name: value for name, value in line.items() if name not in ("step", "seconds")}
            begins = {name.rpartition("/")[0] for name in known}
            what = begins.pop() if len(begins) == 1 else ""
            values = {name.removeprefix(f"{what}/"): _cell(value, record) for name, value in known.items()}
            rows.append(([f"{line['step']:,}", record.name, what], values))
            columns += [name for name in values if name not in columns]
    head = ["step", "run", "evaluation", *columns]
    cells = [[*first, *(values.get(name, settings.MISSING) for name in columns)] for first, values in rows]
    if len(records) == 1:  # whose name is above
        head, *cells = ([row[0], *row[2:]] for row in (head, *cells))
    return table(head, cells, "Evaluations")


def _cell(value: Any, record: Record) -> str:
    if isinstance(value, str):
        return value.removeprefix(f"{record.path}/")
    return f"{value:.5g}" if isinstance(value, float) else settings.show(value)


# Settings


def _settings(records: Sequence[Record], composed: Mapping[str, Any]) -> Markup:
    parts: list[Markup] = []
    if len(records) > 1:
        rows = [[name, *values] for name, values in settings.differences([record.config for record in records])]
        names = [record.name for record in records]
        parts.append(
            table(["option", *names], rows, "Options that differ between the runs")
            if rows
            else element("p", "All options are the same in these runs.")
        )
    for record in records:
        owner = f" of {record.name}" if len(records) > 1 else ""
        parts.append(_configuration(record, composed, f"Configuration{owner}"))
        for what, value in ((f"Data{owner}", record.data), (f"Environment{owner}", record.environment)):
            if value:
                rows = [[name, settings.show(inner)] for name, inner in settings.flatten(value).items()]
                parts.append(element("details", element("summary", what), table(["what", "value"], rows, what)))
    return element("section", element("h2", "Settings"), *parts)


def _configuration(record: Record, composed: Mapping[str, Any], title: str) -> Markup:
    defaults = settings.defaults_of(record.config, composed)
    rows, changed = [], 0
    for name, value in settings.flatten(record.config).items():
        other = name in defaults and not settings.same(value, defaults[name])
        changed += other
        cells = [name, settings.show(value), settings.show(defaults[name]) if other else ""]
        cells = [element("td" if k else "th", cell, scope=None if k else "row") for k, cell in enumerate(cells)]
        rows.append(element("tr", *cells, class_="changed" if other else None))
    head = element("tr", *(element("th", text, scope="col") for text in ("option", "value", "default, where another")))
    search = element(
        "p", element("label", "search ", element("input", type="search", aria_label=f"search {title}")), class_="script"
    )
    return element(
        "details",
        element("summary", f"{title}, {changed} of {len(rows)} options other than the defaults"),
        search,
        element("div", element("table", element("thead", head), element("tbody", *rows)), class_="scroll"),
        open=True,
    )


def _footer(records: Sequence[Record]) -> Markup:
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    counts = [f"{record.name}: {len(record.lines):,} lines of metrics" for record in records]
    return element("footer", element("p", f"Written {now} by python -m sde.report. {'; '.join(counts)}."))
