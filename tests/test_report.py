"""The page of a run: its numbers are those of the record, nothing in it runs or is fetched, a browser can read it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sde.files
from sde.reporting.axes import labels, linear_ticks, log_ticks, make_axis
from sde.reporting.drawing import draw_map
from sde.reporting.html import element
from sde.reporting.media import gather
from sde.reporting.record import read_record
from sde.reporting.series import Levels, smoothed, thin
from sde.reporting.settings import defaults_of
from sde.runs import Run
from tests.commands import TINY_2D, command

BROWSER = next(
    (path for name in ("google-chrome", "chromium", "chromium-browser") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")
VOID = {"br", "img", "input", "meta"}
LEVELS = (-6.5, -1.2, 4.0)


@dataclass
class Element:
    """An element of a page, with all text below it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """The elements below this one with a tag and with (among the words of) attributes."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        below = [e for child in self.children for e in (child, *child.all(tag, **attributes))]
        found = [e for e in below if e.tag == tag and all(e.has(n, v) for n, v in wanted.items())]
        return list({id(e): e for e in found}.values())

    def has(self, name: str, value: str) -> bool:
        """Whether an attribute is `value`, or has it among its words."""
        own = self.attributes.get(name, "")
        return value == own or value in own.split()

    def one(self, tag: str, **attributes: str) -> Element:
        """The only one of them."""
        (found,) = self.all(tag, **attributes)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("document", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(found)
        if tag not in VOID:
            self.open.append(found)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for parent in self.open:
            parent.text += data


def parse(text: str) -> Element:
    """The elements of a page; every one has to be closed in its order."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def data_of(page: Element) -> dict[str, Any]:
    return json.loads(page.one("script", id="data").text)


def chart_of(page: Element, key: str) -> dict[str, Any]:
    (found,) = [chart for chart in data_of(page)["charts"] if chart["key"] == key]
    return found


@pytest.fixture(scope="module")
def trained(point_run: Path) -> Path:
    """A folder with one real run, runs/p, of points in the plane."""
    return point_run


def make_lines(count: int) -> list[dict[str, Any]]:
    """A record with everything in it: noise, a spike, validations, noise levels, a null, later evaluations."""
    draw = random.Random(0)
    lines: list[dict[str, Any]] = []
    for k in range(1, count + 1):
        line: dict[str, Any] = {
            "step": 10 * k,
            "seconds": 1.5 * k,
            "train/loss": 1 / k + 0.01 * draw.random(),
            "train/lr": 1e-3,
        }
        line |= {f"train/eps_mse/log_snr={level}": 0.5 + level / 20 + draw.random() / k for level in LEVELS}
        if k % 5 == 0:
            line |= {"val/loss": 1 / k, "new/name": float(k)}
            line |= {f"val/eps_mse/log_snr={level}": 0.5 + level / 20 + 1 / k for level in LEVELS}
        lines.append(line)
    for step in (10 * (count // 2), 10 * count):
        words = {"likelihood/test/kind": "ode-uniform", "likelihood/test/folder": "/elsewhere/x"}
        lines.append(
            {"step": step, "likelihood/test/bits_per_dim": 5.0 - step / 1e4, "likelihood/test/n": 8.0, **words}
        )
    return lines


def make_run(trained: Path, folder: Path, lines: list[dict[str, Any]] | str, previews: int = 0) -> Path:
    """A run folder with this record and as many previews of different grays."""
    shutil.copytree(trained / "runs" / "p", folder, ignore=shutil.ignore_patterns("previews", "report.html"))
    text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "previews").mkdir()
    for k in range(1, previews + 1):
        Image.new("L", (24, 16), 255 * k // previews).save(folder / "previews" / f"step-{10 * k:08d}.png")
    return folder


def report(*arguments: str, folder: Path, out: str = "page.html") -> Element:
    """The page that the command writes."""
    done = command("sde.report", *arguments, f"out={out}", folder=folder)
    assert done.code == 0, done.err
    assert done.out.strip() == out
    return parse((folder / out).read_text())


# What is on the page


def test_the_page_of_a_real_run(trained: Path) -> None:
    done = command("sde.report", folder=trained)  # the newest run, into its folder
    assert done.code == 0, done.err
    assert Path(done.out.strip()) == Path("runs/p/report.html")
    page = parse((trained / "runs/p/report.html").read_text())
    lines = [json.loads(line) for line in (trained / "runs/p/metrics.jsonl").read_text().splitlines()]
    loss = {series["label"]: series for series in chart_of(page, "loss")["series"]}
    for split in ("train", "val"):
        recorded = [(line["step"], line[f"{split}/loss"]) for line in lines if f"{split}/loss" in line]
        assert recorded
        assert loss[split]["x"] == [step for step, _ in recorded]
        assert loss[split]["y"] == pytest.approx([value for _, value in recorded], rel=1e-5)
    facts = {row.one("dt").text: row.one("dd").text for row in page.one("dl").all("div")}
    assert facts["Step"] == "20 of 20"
    assert facts["Parameters"].endswith(" M")
    assert page.one("h1").text == "p finished"
    assert "vp · eps parameterization · mlp · moons (2, 2 classes)" in page.one("header").text
    assert "by heun in 4 steps" in page.one("header").text
    commands = [code.text for code in page.one("header").all("code")]
    assert commands == [
        "python -m sde.train resume=runs/p training.steps=40",
        "python -m sde.sample run=runs/p",
    ]
    picture = page.one("div", class_="strip").one("img")
    encoded = picture.attributes["src"].removeprefix("data:image/png;base64,")
    (preview,) = (trained / "runs/p/previews").glob("*.png")
    assert base64.b64decode(encoded) == preview.read_bytes()
    assert "step 20" in picture.attributes["alt"]


def test_options_other_than_the_defaults_are_marked(trained: Path) -> None:
    """They are among the ones given on the command line; what is not marked was given its default."""
    page = report("run=runs/p", folder=trained)
    marked = {row.one("th").text: [cell.text for cell in row.all("td")] for row in page.all("tr", class_="changed")}
    given = dict(option.split("=", 1) for option in TINY_2D)
    given |= {f"{group}._target_": given.pop(group) for group in ("model", "data")}
    shown = {row.all("th")[0].text: row.all("td")[0].text for row in page.all("tr") if row.all("td")}
    assert set(marked) <= set(given)
    for name, value in given.items():
        if "_target_" not in name:
            assert shown[name] == value
    assert {"training.steps", "model.width", "model._target_", "data._target_"} <= set(marked)


def test_defaults_come_from_the_class_where_the_group_has_another_file() -> None:
    composed = {"sde": {"_target_": "sde.processes.VP", "beta_max": 20.0}, "ema": {"decay": 0.9}}
    config = {"sde": {"_target_": "sde.processes.VE", "sigma_max": 7.0}, "ema": {"decay": 0.5}, "mine": 1}
    found = defaults_of(config, composed)
    assert found["sde._target_"] == "sde.processes.VP"
    assert found["sde.sigma_max"] == 50.0
    assert found["ema.decay"] == 0.9
    assert "mine" not in found


def test_everything_recorded_is_shown(trained: Path, tmp_path: Path) -> None:
    lines = make_lines(40)
    make_run(trained, tmp_path / "r", lines, previews=3)
    page = report("run=r", folder=tmp_path)
    keys = {chart["key"] for chart in data_of(page)["charts"]}
    assert keys == {"loss", "lr", "new/name", "level-eps_mse", "likelihood/test/bits_per_dim"}
    levels = {series["label"]: series for series in chart_of(page, "level-eps_mse")["series"]}
    last = [line for line in lines if "val/loss" in line][-1]
    assert levels["val, step 400"]["x"] == list(LEVELS)
    expected = [last[f"val/eps_mse/log_snr={level}"] for level in LEVELS]
    assert levels["val, step 400"]["y"] == pytest.approx(expected, rel=1e-5)
    assert {"train, step 400", "val, step 50", "val, step 200"} <= levels.keys()
    maps = {found["key"]: found for found in data_of(page)["maps"]}
    assert maps.keys() == {"map-0-train/eps_mse", "map-0-val/eps_mse"}
    assert maps["map-0-val/eps_mse"]["steps"] == list(range(50, 401, 50))
    assert maps["map-0-val/eps_mse"]["rows"][-1] == pytest.approx(expected, rel=1e-3)
    texts = [[cell.text for cell in row.all("td")] for row in page.all("tr")]
    assert ["likelihood/test", "4.96", "8", "ode-uniform", "/elsewhere/x"] in texts


def test_charts_stand_without_a_script(trained: Path, tmp_path: Path) -> None:
    """As many points as lines, at the right places, between ticks that say so."""
    lines = [{"step": k, "seconds": 1.0, "train/loss": value} for k, value in enumerate([4.0, 1.0, 3.0, 2.0])]
    make_run(trained, tmp_path / "r", lines)
    page = report("run=r", folder=tmp_path)
    chart = page.one("figure", data_key="loss")
    points = [
        tuple(map(float, p.split())) for p in re.split("[ML]", chart.one("path", class_="curve").attributes["d"])[1:]
    ]
    ticks = {t.text: float(t.attributes["y"]) for t in chart.all("text", class_="y")}
    steps = {t.text: float(t.attributes["x"]) for t in chart.all("text", class_="x")}
    assert len(points) == 4
    for (x, y), line in zip(points, lines, strict=True):
        assert y == pytest.approx(ticks["1"] + (line["train/loss"] - 1) * (ticks["4"] - ticks["1"]) / 3, abs=0.2)
        assert x == pytest.approx(steps["0"] + line["step"] * (steps["3"] - steps["0"]) / 3, abs=0.2)
    label = chart.one("svg").attributes["aria-label"]
    assert "train ends at 2" in label


STRANGE = f"""{{"step": 1, "seconds": 1, "a": 1e308, "b": 5e-324, "": 1, "c": -Infinity, "d": true}}
{{"step": 2, "seconds": "x", "": 1}}
{{"step": 3, "seconds": 1, "a": {10**400}, "b/log_snr=1": 1, "b/log_snr=x": 1}}
{{"step": 4, "": 2}}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no line of metrics yet"),
        ('{"step": 5, "seconds": 1.0, "train/loss": 0.5}\n', "train"),
        ('{"step": 5, "seconds": 1.0, "train/loss": null}\n{"step": 6, "seconds": 2.0, "train/loss": NaN}\n', "train"),
        ('{"step": 5, "seconds": 1.0, "train/loss": 0.5}\n{"step": 6, "seco', "train"),
        (STRANGE, "finished"),
        ('{"step": 5, "seconds": null, "train/loss": 0.5}\n{"step": 5, "kind": "x", "a/b": 1}\n[1]\nnull\n', "a/b"),
    ],
    ids=["none", "one", "nulls", "cut off", "strange", "odd"],
)
def test_records_of_any_kind(text: str, expected: str, trained: Path, tmp_path: Path) -> None:
    make_run(trained, tmp_path / "r", text)
    page = report("run=r", folder=tmp_path)
    assert expected in page.text
    assert "There are no previews yet" in page.text
    keys = [figure.attributes["data-key"] for figure in page.all("figure", class_="chart")]
    assert len(set(keys)) == len(keys)  # the script finds the figure of each chart by them


def test_what_is_not_finite_is_marked_and_breaks_the_curve(trained: Path, tmp_path: Path) -> None:
    values = [1.0, 2.0, None, 3.0]
    make_run(trained, tmp_path / "r", [{"step": k, "seconds": k, "train/loss": v} for k, v in enumerate(values, 1)])
    chart = report("run=r", folder=tmp_path).one("figure", data_key="loss")
    assert len(chart.all("path", class_="bad")) == 1
    assert re.sub(r"[^ML]", "", chart.one("path", class_="curve").attributes["d"]) == "MLM"


def test_steps_done_again_count_once(trained: Path, tmp_path: Path) -> None:
    lines = [
        {"step": s, "seconds": t, "train/loss": v} for s, t, v in ((1, 1, 9.0), (2, 2, 8.0), (2, 3, 5.0), (3, 4, 4.0))
    ]
    make_run(trained, tmp_path / "r", lines)
    (series,) = chart_of(report("run=r", folder=tmp_path), "loss")["series"]
    assert (series["x"], series["y"]) == ([1, 2, 3], [9.0, 5.0, 4.0])


def test_a_run_that_is_being_written(trained: Path, tmp_path: Path) -> None:
    lines = [{"step": step, "seconds": step / 2 + 100 * (step > 1), "train/loss": 1.0} for step in (1, 8, 12)]
    make_run(trained, tmp_path / "r", lines)
    with Run(tmp_path / "r").locked():
        page = report("run=r", folder=tmp_path)
    assert page.one("h1").text == "r running"
    facts = {row.one("dt").text: row.one("dd").text for row in page.one("dl").all("div")}
    assert facts["To go, about"] == "1 min 16 s"  # 8 steps: 105.5 s were 11


def test_several_runs_share_their_charts(trained: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(trained, tmp_path / name / "r", make_lines(20), previews=2)
    config = tmp_path / "b" / "r" / "config.yaml"
    config.write_text(config.read_text().replace("width: 16", "width: 24"))
    page = report("run=[a/r,b/r,a/r]", folder=tmp_path)  # each once
    assert [series["label"] for series in chart_of(page, "loss")["series"]] == [
        "a/r train", "a/r val", "b/r train", "b/r val",
    ]  # fmt: skip
    rows = [[cell.text for cell in (*row.all("th"), *row.all("td"))] for row in page.all("tr")]
    assert ["", "a/r", "b/r"] in rows
    assert rows.count(["model.width", "16", "24"]) == 1
    assert ["option", "a/r", "b/r"] in rows
    assert len(page.all("div", class_="strip")) == 2
    default = command("sde.report", "run=[a/r,b/r]", folder=tmp_path)
    assert default.out.strip() == "report.html"


# Nothing in it runs or is fetched


NASTY = "</script><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">&'\""


def nasty_run(trained: Path, folder: Path) -> Path:
    lines = make_lines(30)
    lines[0][f"train/{NASTY}"] = 1.0
    lines[-1]["likelihood/test/kind"] = NASTY.replace("/", "")
    lines[-1]["likelihood/test/folder"] = NASTY
    run = make_run(trained, folder, lines, previews=2)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("conditional: false", f"conditional: {json.dumps(NASTY)}"))
    for name in ("environment.json", "data.json"):
        content = json.loads((run / name).read_text()) | {NASTY: NASTY, "device": NASTY, "name": NASTY}
        (run / name).write_text(json.dumps(content))
    return run


def test_everything_is_escaped(trained: Path, tmp_path: Path) -> None:
    name = NASTY.replace("/", "∕")[:100]
    nasty_run(trained, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / name)
    text = command("sde.report", f"runs={tmp_path}", "out=page.html", folder=tmp_path)
    assert text.code == 0, text.err
    page = parse((tmp_path / "page.html").read_text())
    assert len(page.all("script")) == 2
    assert not [e for e in page.all("img") if "onerror" in e.attributes]
    assert name in page.one("h1").text
    assert NASTY in [cell.text for cell in page.all("td")]
    assert any(chart["key"] == NASTY for chart in data_of(page)["charts"])
    sources = [e.attributes[a] for tag in ("img", "image", "script", "link", "a") for e in page.all(tag)
               for a in ("src", "href") if a in e.attributes]  # fmt: skip
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?\s*(https?:)?//", (tmp_path / "page.html").read_text())


def test_the_browser_is_told_to_run_that_script_alone(trained: Path) -> None:
    page = report("run=runs/p", folder=trained)
    policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data:"
    (script,) = [e for e in page.all("script") if "type" not in e.attributes]
    for name, content in (("script-src", script.text), ("style-src", page.one("style").text)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert directives[name] == f"'sha256-{digest}'"
    assert not [
        e for tag in ("div", "p", "img", "td", "span", "svg", "i") for e in page.all(tag) if "style" in e.attributes
    ]


def test_elements_escape_what_is_not_markup() -> None:
    made = element("p", "a<b & c", element("b", "x"), title='"<>', data_x=1, hidden=True, lang=None)
    assert made == '<p title="&quot;&lt;&gt;" data-x="1" hidden>a&lt;b &amp; c<b>x</b></p>'


# Thinning, smoothing, axes, maps


@pytest.mark.parametrize("nulls", [False, True])
def test_thinning_keeps_ends_and_extremes(nulls: bool) -> None:
    draw = random.Random(1)
    y: list[float | None] = [draw.gauss(0, 1) for _ in range(10_007)]
    y[5000], y[7000] = 50.0, -50.0
    if nulls:
        y[3000] = y[3001] = None
    x = [float(k) for k in range(len(y))]
    thin_x, thin_y, means = thin(x, y, 200)
    assert means is not None
    assert len(thin_x) == len(thin_y) == len(means) <= 200
    assert len(thin_x) > 100
    assert all(a < b for a, b in pairwise(thin_x))
    assert (thin_x[0], thin_x[-1]) == (0.0, 10_006.0)
    assert {50.0, -50.0} <= set(thin_y)
    assert (None in thin_y) is nulls
    assert all(y[int(a)] == b for a, b in zip(thin_x, thin_y, strict=True))
    finite = [value for value in y if value is not None]
    kept = [value for value in means if value is not None]
    # each stretch's mean stands for its two points; a stretch of n values has a standard error of 1 / sqrt(n)
    assert np.mean(kept) == pytest.approx(np.mean(finite), abs=4 / math.sqrt(len(finite)) + 0.02)
    assert thin(x[:200], y[:200], 200) == (x[:200], y[:200], None)


def test_smoothing_is_a_weighted_mean() -> None:
    draw = random.Random(2)
    y: list[float | None] = [draw.gauss(0, 1) for _ in range(60)]
    y[7] = y[40] = None
    tau = 0.1 * len(y)
    for i, value in enumerate(smoothed(y, 0.1)):
        pairs = [(math.exp(-abs(i - j) / tau), v) for j, v in enumerate(y) if v is not None]
        exact = sum(w * v for w, v in pairs) / sum(w for w, _ in pairs)
        assert (value is None) == (y[i] is None)
        assert value is None or value == pytest.approx(exact, rel=1e-12, abs=1e-12)
    assert smoothed(y, 0) == y


def test_ticks() -> None:
    assert linear_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert labels(linear_ticks(-0.031, 0.1, 5)) == ["0", "0.05", "0.1"]
    assert labels([0, 250_000, 500_000]) == ["0", "250k", "500k"]
    assert labels([0.0, 5e-5, 1e-4]) == ["0", "5e-5", "1e-4"]
    assert labels([990.0, 1000.0, 1010.0]) == ["990", "1000", "1010"]
    assert labels([1.5e6, 2e6]) == ["1.5M", "2M"]
    assert log_ticks(0.9, 1100, 5) == [1, 10, 100, 1000]
    assert labels(log_ticks(0.9e-6, 1.1e-3, 5)) == ["1e-6", "1e-5", "1e-4", "0.001"]
    assert labels(log_ticks(2, 3, 4)) == ["2", "2.2", "2.4", "2.6", "2.8", "3"]  # less than a decade
    assert len(log_ticks(1e-30, 1e30, 5)) <= 6


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[], [None], [3.0], [0.0], [0.0, 0.0], [-1.0, 5.0], [1e-30, 1e30], [7.0, 7.0 + 1e-14]]
)
def test_every_axis_can_be_drawn(values: list[float | None], log: bool) -> None:
    axis = make_axis(values, 5, log=log)
    assert axis.low < axis.high
    assert len(axis.ticks) == len(axis.labels)
    assert all(-1e-6 <= axis.place(tick) <= 1 + 1e-6 for tick in axis.ticks)
    assert all(0 < axis.place(v) < 1 for v in values if v is not None and (v > 0 or not log))


def test_levels_without_examples_are_left_out(trained: Path, tmp_path: Path) -> None:
    """And are not taken for numbers that were not finite."""
    name, other, third = (f"train/eps_mse/log_snr={level}" for level in LEVELS)
    lines = [
        {"step": 1, "seconds": 1, name: 1.0, other: 2.0, third: 3.0},
        {"step": 2, "seconds": 2, name: 1.0, third: None},
    ]
    make_run(trained, tmp_path / "r", lines)
    page = report("run=r", folder=tmp_path)
    (series,) = chart_of(page, "level-eps_mse")["series"]
    assert (series["x"], series["y"]) == ([LEVELS[0], LEVELS[2]], [1.0, None])
    assert len(page.one("figure", data_key="level-eps_mse").all("path", class_="bad")) == 1
    assert data_of(page)["maps"][0]["rows"] == [[1.0, 2.0, 3.0], [1.0, None, None]]


def test_maps_show_each_number_at_its_place() -> None:
    levels = Levels(
        "val/eps_mse", 0, [-2.0, 3.0], [100, 200, 300, 400], [[1.0, 0.1], [0.01, 0.1], [None, 1.0], [math.nan, 1.0]]
    )
    svg = parse(draw_map(levels))
    picture = svg.all("image")[0].attributes["href"].removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).astype(int)
    assert pixels.shape == (2, 4, 3)
    low, middle, high, none = (68, 1, 84), (33, 145, 140), (253, 231, 37), (128, 128, 128)
    assert [tuple(p) for p in pixels[1]] == [high, low, none, none]  # below: the noisiest
    assert [tuple(p) for p in pixels[0]] == [middle, middle, high, high]  # logarithmic: 0.1 is between 0.01 and 1
    many = Levels("x", 0, [0.0], [1, 2, *range(1000, 9000)], [[float(k)] for k in range(8002)])
    steps, rows = many.columns(50)
    assert len(steps) == len(rows) == 50
    assert (steps[0], steps[-1]) == (1, 8999)
    assert all(rows[k] == many.rows[many.steps.index(step)] for k, step in enumerate(steps))


def test_long_records_make_small_pages(trained: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    lines = [{"step": k, "seconds": k / 10, "train/loss": draw.random(), "train/lr": 1e-3} for k in range(20_000)]
    lines[12_345]["train/loss"] = 99.0
    make_run(trained, tmp_path / "r", lines)
    page = report("run=r", folder=tmp_path)
    (series,) = chart_of(page, "loss")["series"]
    assert (12_345, 99.0) in list(zip(series["x"], series["y"], strict=True))
    assert len(series["x"]) <= 2000
    assert len(data_of(page)["clocks"][0]["step"]) <= 501
    # 2000 points of two curves: as numbers for the script, and as the smoothed and the raw path
    assert (tmp_path / "page.html").stat().st_size < 300_000


# Pictures


def test_pictures_are_spread_over_the_run_and_fit(trained: Path, tmp_path: Path) -> None:
    run = make_run(trained, tmp_path / "r", make_lines(5), previews=100)
    (run / "previews" / "step-00009999.png").write_bytes(b"no picture")
    (run / "previews" / "notes.png").write_bytes(b"no picture")
    Image.new("L", (8, 8)).save(run / "previews" / "step-00001000.gif")
    for k, name in enumerate(("samples/a/grid.png", "samples/b/grid.png", "ema/profiles.png")):
        (run / name).parent.mkdir(parents=True)
        Image.new("L", (8, 8), k).save(run / name)
    (run / "likelihood/x").mkdir(parents=True)
    (run / "likelihood/x/histogram.png").write_text("<svg/>")
    gallery = gather(run, 5, 1e6)
    steps = [p.step for p in gallery.previews]
    assert (steps[0], steps[-1], len(steps)) == (10, 1000, 5)
    assert all(200 <= b - a <= 300 for a, b in pairwise(steps))
    assert gallery.animation is not None
    assert [p.path.relative_to(run).as_posix() for p in gallery.others] == ["samples/b/grid.png", "ema/profiles.png"]
    assert "5 of 100 previews are shown" in " ".join(gallery.notes)
    assert "likelihood/x/histogram.png is no PNG or GIF" in " ".join(gallery.notes)
    one = gallery.previews[-1].bytes
    assert one >= len(gallery.previews[-1].uri())
    others = sum(p.bytes for p in (*gallery.others, gallery.animation))
    small = gather(run, 24, others + 4.5 * one)
    assert sum(p.bytes for p in (*small.previews, *small.others, small.animation)) <= others + 4.5 * one  # type: ignore[misc]
    assert 2 <= len(small.previews) <= 4
    nothing = gather(run, 24, 10)
    assert (nothing.previews, nothing.animation, nothing.others) == ([], None, [])
    assert "would make the page too large" in nothing.notes[0]


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run=nope"], ["run=nope", "does not exist"]),
        (["run=[runs/p,nope]"], ["run=nope", "does not exist"]),
        (["run=[]"], ["run=[]", "run=[A,B]"]),
        (["runs=empty"], ["there is no run to show", "python -m sde.train"]),
        (["run=bare"], ["bare", "config.yaml"]),
        (["run=quiet"], ["quiet", "metrics.jsonl"]),
        (["out=runs"], ["out=runs", ".html"]),
        (["out=runs/p/config.yaml"], ["out=runs/p/config.yaml", ".html"]),
        (["open=maybe"], ["open='maybe'", "true or false"]),
        (["previews=0"], ["previews=0", "at least 1"]),
        (["max_megabytes=-1"], ["max_megabytes=-1", "above 0"]),
        (["max_megabyte=1"], ["max_megabyte", "did you mean 'max_megabytes'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_sentence(arguments: list[str], expected: list[str], trained: Path) -> None:
    for name in ("bare", "quiet"):
        (trained / name).mkdir(exist_ok=True)
    shutil.copy(trained / "runs/p/config.yaml", trained / "quiet")
    before = {path for path in trained.rglob("*") if path.is_file()}
    done = command("sde.report", *arguments, folder=trained)
    assert done.code == 2
    assert all(word in done.sentence for word in expected), done.sentence
    assert done.err.count("\n") == 1
    assert {path for path in trained.rglob("*") if path.is_file()} == before


def test_a_browser_is_opened_where_it_is_wanted(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    make_run(trained, tmp_path / "r", make_lines(5))
    report("run=r", folder=tmp_path)
    assert opened == []
    report("run=r", "open=true", folder=tmp_path)
    assert opened == [(tmp_path / "page.html").as_uri()]


def test_a_page_is_never_half_written(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(trained, tmp_path / "r", make_lines(5))
    (tmp_path / "page.html").write_text("the last one")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sde.files, "sync", full)
    done = command("sde.report", "run=r", "out=page.html", folder=tmp_path)
    assert done.code == 1
    assert "no space" in done.sentence
    assert (tmp_path / "page.html").read_text() == "the last one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "r"]


def test_the_folder_is_only_read(trained: Path, tmp_path: Path) -> None:
    run = make_run(trained, tmp_path / "r", make_lines(5), previews=1)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    report("run=r", folder=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert read_record(Run(run)).name == "r"


# In a browser


def browse(page: Path, folder: Path, fragment: str = "") -> Element:
    """The page as a browser has it after its scripts have run."""
    assert BROWSER is not None
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=4000",
        "--window-size=1000,800",
    ]
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={folder}", "--dump-dom", page.resolve().as_uri() + fragment],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return parse(done.stdout)


def points(chart: Element, **attributes: str) -> list[int]:
    """Points of each curve."""
    return [len(re.findall("[ML]", e.attributes["d"])) for e in chart.all("path", class_="curve", **attributes)]


@needs_browser
def test_a_browser_draws_the_page_and_nothing_foreign_runs(trained: Path, tmp_path: Path) -> None:
    """The whole page as it is written, policy included, of a run that tries to run scripts."""
    run = nasty_run(trained, tmp_path / "r")
    static = report("run=r", folder=tmp_path)
    seen = browse(tmp_path / "page.html", tmp_path / "profile")
    body = seen.one("body")
    assert body.attributes["data-ready"] == "true"
    assert body.attributes["data-errors"] == "0"
    assert seen.one("title").text == "r: report"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    count = sum("train/loss" in line for line in lines)
    assert points(seen.one("figure", data_key="loss")) == [count, count, sum("val/loss" in line for line in lines)]
    for chart in static.all("figure", class_="chart"):  # the script has the same rules for ticks
        drawn = seen.one("figure", data_key=chart.attributes["data-key"])
        texts, others = ([t.text for t in figure.all("text", class_="y")] for figure in (chart, drawn))
        assert texts == others
        assert texts
    shown = [figure.attributes["data-step"] for figure in seen.all("figure", class_="shown")]
    assert shown == ["20"]
    legend = seen.one("figure", data_key="loss").one("ul").all("span", class_="value")
    assert float(legend[1].text) == pytest.approx(lines[-3]["val/loss"], rel=1e-3)


@needs_browser
def test_the_address_says_what_is_looked_at(trained: Path, tmp_path: Path) -> None:
    make_run(trained, tmp_path / "r", make_lines(40), previews=4)
    report("run=r", folder=tmp_path)
    seen = browse(tmp_path / "page.html", tmp_path / "profile", "#step=25&log=lr&linear=loss&from=100&to=200&smooth=0")
    assert seen.one("body").attributes["data-errors"] == "0"
    assert [figure.attributes["data-step"] for figure in seen.all("figure", class_="shown")] == ["20"]
    pressed = {key: seen.one("figure", data_key=key).one("button").attributes["aria-pressed"] for key in ("lr", "loss")}
    assert pressed == {"lr": "true", "loss": "false"}
    chart = seen.one("figure", data_key="loss")
    assert points(chart) == [40, 8]  # not smoothed
    ticks = [float(t.text) for t in chart.all("text", class_="x")]
    assert min(ticks) >= 100
    assert max(ticks) <= 200


DRIVER = """
const seen = {};
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const loss = document.querySelector('figure[data-key="loss"]');
const ticks = (name) => all(`text.${name}`, loss).map((t) => t.textContent);
const d = () => all("path.curve", loss).map((p) => p.getAttribute("d"));
const plot = loss.querySelector(".plot");
const press = (key) => plot.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
const set = (node, value, type) => { node.value = value; node.dispatchEvent(new Event(type, { bubbles: true })); };
seen.before = [ticks("y"), d()];
loss.querySelector("button").click();
seen.log = [ticks("y"), d(), loss.querySelector("button").getAttribute("aria-pressed"), location.hash];
loss.querySelector("button").click();
seen.again = [ticks("y"), d()];
set(document.querySelector("#preview"), 0, "input");
seen.first = all("figure.shown").map((f) => f.dataset.step);
set(document.querySelector("#smooth"), 0.2, "input");
seen.smooth = d();
set(document.querySelector("#smooth"), 0.02, "input");
press("Home");
seen.home = loss.querySelector(".at").textContent;
press("ArrowRight");
seen.right = loss.querySelector(".at").textContent;
const box = loss.querySelector("svg").getBoundingClientRect();
const at = (type, share, buttons) => plot.dispatchEvent(new PointerEvent(type,
  { clientX: box.left + 54 + share * (box.width - 66), clientY: box.top + 50, bubbles: true, buttons }));
at("pointermove", 0.5, 0);
seen.hover = [loss.querySelector(".at").textContent, ...all(".value", loss).map((v) => v.textContent)];
at("pointerdown", 0.25, 1); at("pointermove", 0.5, 1); at("pointerup", 0.5, 0);
seen.zoom = [ticks("x"), document.querySelector("#from").value, document.querySelector("#to").value];
document.querySelector("#reset").click();
seen.reset = d();
set(document.querySelector("#x"), "time", "change");
seen.time = [loss.querySelector("text.name").textContent, ticks("x")];
const search = document.querySelector("input[type=search]");
set(search, "model width", "input");
seen.found = all("tbody tr:not([hidden]) th", search.closest("details")).map((th) => th.textContent);
document.body.dataset.seen = JSON.stringify(seen);
"""


@needs_browser
def test_the_controls_work(trained: Path, tmp_path: Path) -> None:
    """Events of a mouse and of a keyboard, sent by a script added to a copy of the page without its policy."""
    make_run(trained, tmp_path / "r", make_lines(40), previews=4)
    report("run=r", folder=tmp_path)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", (tmp_path / "page.html").read_text())
    (tmp_path / "driven.html").write_text(text.replace("</body>", f"<script>{DRIVER}</script></body>"))
    body = browse(tmp_path / "driven.html", tmp_path / "profile").one("body")
    assert body.attributes["data-errors"] == "0"
    seen = json.loads(body.attributes["data-seen"])
    # 1 to 1/40 is logarithmic at first; the button makes it linear and back
    assert seen["before"][0] == ["0.05", "0.1", "0.2", "0.5", "1"]
    assert seen["log"][0] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert seen["log"][1] != seen["before"][1]
    assert seen["log"][2:] == ["false", "#linear=loss"]
    assert seen["again"] == seen["before"]
    assert seen["first"] == ["10"]
    assert seen["smooth"][0] == seen["before"][1][0]  # the raw line stays
    assert seen["smooth"][1] != seen["before"][1][1]
    assert (seen["home"].split(":")[0], seen["right"].split(":")[0]) == ("step 10", "step 20")
    step = int(seen["hover"][0].removeprefix("step "))
    assert step in (200, 210)  # the middle of 10 to 400
    expected = next(line for line in make_lines(40) if line["step"] == step)["train/loss"]
    assert float(seen["hover"][1].split(" ")[0]) == pytest.approx(expected, rel=1e-3)
    assert float(seen["zoom"][1]) == pytest.approx(10 + 0.25 * 390, abs=8)
    assert float(seen["zoom"][2]) == pytest.approx(10 + 0.5 * 390, abs=8)
    assert all(100 <= float(tick) <= 212 for tick in seen["zoom"][0])
    assert seen["reset"] == seen["before"][1]
    assert seen["time"][0] == "seconds"  # 60 of them
    assert seen["time"][1][-1] == "60"
    assert seen["found"] == ["model.width"]
