import base64
import dataclasses
import io
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from report_demo import ENVIRONMENT, demo_results
from rich.console import Console

from unigendet.environment import environment
from unigendet.evaluation.detection import DetectionOutcome, evaluate_detection
from unigendet.evaluation.figures import data_uri, line_chart, save_image_grid, tile
from unigendet.evaluation.pages import number, percent, seconds
from unigendet.evaluation.quickstart_report import format_table, write_report
from unigendet.evaluation.results import Aim, ImageGrid, RunResults, choose_examples

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, addresses and text, and insists that what is opened is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.words, self.images, self._open = set(), [], [], [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def results():
    return demo_results()


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "report"
    assert write_report(folder, results) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def minimal(**parts):
    return RunResults(environment=ENVIRONMENT, **parts)


def test_page_needs_nothing_but_itself(html):
    page = Page(html)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_page_shows_every_part(html, results):
    page = Page(html)
    for name in (
        "GDUF",
        "DIGA",
        "alignment",
        "held out",
        "a handwritten digit seven",
        "no clear verdict",
        "95 % interval",
    ):
        assert name in page.text
    assert html.count("<svg") == 4 + 3
    assert len(page.images) == 3 * 10 + len(results.examples)
    assert all(image["alt"] for image in page.images)
    assert percent(results.detection.overall.accuracy) in html
    assert number(results.frechet["after DIGA"]) in html
    assert number(results.reference.frechet_train_matched) in html


def test_aims_are_told_honestly(html):
    badges = re.findall(r'<div class="aim">.*?</div>', html)
    assert [re.sub(r"<[^>]*>", "", badge).replace("\u00a0", " ") for badge in badges] == [
        "aim ≥ 90.0 % ✗ not reached",
        "aim ≥ 99.0 % ✓ reached",
        "aim ≤ 40 ✓ reached",
        "no aim set",
        "aim ≤ 3 min 00 s ✓ reached",
        "aim ≤ 2 ✗ not measured",
    ]


@pytest.mark.parametrize(
    ("value", "aim", "higher", "reached"),
    [
        (0.9, 0.9, True, True),
        (0.89, 0.9, True, False),
        (5, 4, False, False),
        (4, 4, False, True),
        (None, 1, True, False),
        (math.nan, 1, False, False),
        (0.5, None, True, None),
    ],
)
def test_reached(value, aim, higher, reached):
    assert Aim("a", value, aim, higher_is_better=higher).reached is reached


def test_text_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&'
    outcome = DetectionOutcome(evil, evil, 0, None, 0.5, evil, evil)
    page = write_report(
        tmp_path,
        minimal(
            title=evil,
            summary=evil,
            aims=(Aim(evil, 0.5, meaning=evil),),
            curves={evil: [{"step": 1, evil: 1.0}, {"step": 2, evil: 0.5}]},
            grids=(ImageGrid(evil, (evil,), np.zeros((1, 2, 8, 8))),),
            detection=evaluate_detection([outcome]),
            roles={evil: evil},
            examples=choose_examples([outcome], {evil: np.ones((8, 8))}),
            frechet={evil: 1.0},
            settings={evil: [evil]},
            durations={evil: 1.0},
        ),
    )
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    assert 'alert("x")' not in html
    assert evil in Page(html).text


def test_same_results_same_bytes(folder, results, tmp_path):
    write_report(tmp_path, demo_results())
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert [path.as_posix() for path in files] == [
        "grids/00-before-diga.png",
        "grids/01-after-diga.png",
        "grids/02-real-digits.png",
        "report.html",
        "report.json",
    ]
    for path in files:
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes(), path


def test_json_follows_its_schema(folder, results):
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert list(data) == [
        "schema", "title", "summary", "seed", "environment", "settings", "durations", "aims", "curves", "detection",
        "examples", "agreement", "frechet", "reference", "grids",
    ]  # fmt: skip
    assert data["schema"] == 1
    assert data["detection"]["overall"]["accuracy"] == results.detection.overall.accuracy
    groups = [group["group"] for group in data["detection"]["groups"]]
    assert groups == [
        "real",
        "Gaussian mixture",
        "kernel density",
        "UniGenDet",
    ]
    assert data["detection"]["groups"][0]["f1"] is None
    assert data["detection"]["roles"]["kernel density"] == "held out"
    assert data["agreement"]["after DIGA"]["per_digit"]["3"] == results.agreement["after DIGA"].per_digit[3]
    assert data["curves"]["GDUF"][0]["step"] == 1
    assert [aim["reached"] for aim in data["aims"]] == [False, True, True, None, True, False]
    assert data["environment"] == ENVIRONMENT


def test_numbers_that_are_not_finite(tmp_path):
    curves = {
        "GDUF": [
            {"step": 1, "loss": 2.0},
            {"step": 2, "loss": math.nan},
            {"step": 3, "loss": math.inf, "mse": math.nan},
        ]
    }
    page = write_report(tmp_path, minimal(curves=curves, frechet={"after": math.nan}, aims=(Aim("a", math.inf, 1),)))
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert [point["loss"] for point in data["curves"]["GDUF"]] == [2.0, None, None]
    assert (data["frechet"]["after"], data["aims"][0]["value"], data["aims"][0]["reached"]) == (None, None, False)
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == 1  # nothing to draw of mse
    assert re.search(r"\b(nan|inf)\b", Page(html).text, re.IGNORECASE) is None


def test_an_empty_run_has_a_page(tmp_path):
    page = Page(write_report(tmp_path, minimal(title="empty")).read_text(encoding="utf-8"))
    assert "Generated images" not in page.text
    assert "Confusion table" not in page.text
    assert not (tmp_path / "grids").exists()


def test_environment_is_read_if_not_given(tmp_path):
    found = environment()
    assert {"python", "numpy", "torch"} <= set(found["versions"])
    assert 1 <= found["cpus"] <= os.cpu_count()
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40,64}(\+changes)?", found["commit"])
    write_report(tmp_path, RunResults())
    assert json.loads((tmp_path / "report.json").read_text())["environment"]["versions"] == found["versions"]


def test_terminal_table(results):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(format_table(results))
    text = console.export_text().replace("\u00a0", " ")
    for part in (
        "not reached",
        "not measured",
        "kernel density (held out)",
        "≤ 3 min 00 s",
        "95.8 %",
        "before DIGA",
        "real digits",
    ):
        assert part in text
    console.print(format_table(RunResults(aims=(Aim("[red]odd[/nothing]", 0.5),))))
    assert "[red]odd[/nothing]" in console.export_text()


def test_terminal_table_fits_80_columns(results):
    """A line per group, none wrapped, with the longest names and roles that the quickstart has."""
    names = ("real", "gaussian_mixture", "kernel_density", "unigendet")
    roles = dict(zip(names, ("real", "seen in training", "held out", "the model's own samples"), strict=True))
    full = {"unparsed": 0, "accuracy": 1.0, "balanced_accuracy": 1.0, "roc_auc": 1.0, "rouge_l": 1.0, "count": 1588}
    metrics = [dataclasses.replace(results.detection.overall, group=name, **full) for name in (*names, "overall")]
    detection = dataclasses.replace(results.detection, groups=tuple(metrics[:-1]), overall=metrics[-1])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(format_table(RunResults(detection=detection, roles=roles)))
    lines = console.export_text().replace("\u00a0", " ").splitlines()
    assert len(lines) == 1 + 3 + 5  # blank; title, names, rule; groups
    assert lines[6].split() == ["kernel_density", "(held", "out)", "1588", *["100.0", "%"] * 4]
    assert not any("unparsed" in line or "…" in line for line in lines)


def test_examples_are_the_first_ones():
    outcomes = [DetectionOutcome(f"{i}", "ab"[i % 2], 0, i // 2 % 2) for i in range(12)]
    images = {outcome.name: np.zeros((8, 8)) for outcome in outcomes}
    names = [example.outcome.name for example in choose_examples(outcomes, images, right=2, wrong=1)]
    assert names == ["0", "4", "2", "1", "5", "3"]  # group a: right, right, wrong; then group b
    with pytest.raises(ValueError, match="without '0'"):
        choose_examples(outcomes, {})


def test_image_grid_pixels(tmp_path):
    images = np.arange(3 * 2 * 2).reshape(3, 2, 2) * 1.5  # 0 .. 16.5, the last one clipped
    path = save_image_grid(images, tmp_path / "new" / "grid.png", columns=2, scale=3, gap=1)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == ((2 + 1 + 2) * 3, (2 + 1 + 2) * 3, 4)
    small = pixels[::3, ::3]
    assert (pixels == small.repeat(3, 0).repeat(3, 1)).all()  # nearest neighbour
    assert small[:2, :2, 0].tolist() == [[0, 24], [48, 72]]
    assert small[3:, :2, 0].tolist() == [[191, 215], [239, 255]]
    assert (small[2] == 0).all()  # the gap is transparent
    assert (small[3:, 3:, 3] == 0).all()  # so is the place of a fourth image
    assert (small[:2, 3:, 3] == 255).all()


def test_colour_and_large_images(tmp_path):
    colour = np.zeros((2, 4, 4, 3))
    colour[1, :, :, 2] = 1
    assert tile(colour, columns=1, scale=1, gap=0, high=1)[4, 0].tolist() == [0, 0, 255, 255]
    uri = data_uri(np.full((2, 300, 600, 3), 0.5), columns=2, size=60, high=1)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert picture.size == (120 + 7 + 120, 60)
    assert picture.getpixel((5, 5)) == (128, 128, 128, 255)
    grid = ImageGrid("colour", ("a",), colour[None], high=1)
    assert "colour" in write_report(tmp_path, minimal(grids=(grid,))).read_text(encoding="utf-8")


def test_chart_colours_are_the_page_s():
    svg = line_chart(range(1, 101), np.geomspace(100, 0.1, 100), name='a "name"', salt="s")
    assert svg.startswith("<svg")
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
    assert "currentColor" in svg
    assert "var(--accent)" in svg
    assert 'aria-label="a  name "' in svg
    assert ">100<" in svg  # a logarithmic axis with labels that are written out
    assert ">0.1<" in svg


@pytest.mark.parametrize("values", [[], [1.0], [0.5, 0.5], list(range(5000)), [1e-9, 1.0], [-1.0, 1.0]])
def test_chart_of_odd_curves(values):
    Page(line_chart(range(len(values)), values, name="x", salt="x"))


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (percent, 0.98765, "98.8 %"),
        (percent, None, "–"),
        (number, 12.3456, "12.3"),
        (number, 0.00012345, "0.000123"),
        (number, 12345.6, "12,300"),
        (number, 99.96, "100"),
        (number, None, "–"),
        (seconds, 3.21, "3.2 s"),
        (seconds, 59.97, "1 min 00 s"),
        (seconds, 161.4, "2 min 41 s"),
        (seconds, 7260, "2 h 01 min"),
    ],
)
def test_how_numbers_are_written(write, value, text):
    assert write(value).replace("\u00a0", " ") == text


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"images\.shape is \(2, 8, 8\)"):
        ImageGrid("a", ("x", "y"), np.zeros((2, 8, 8)))
    with pytest.raises(ValueError, match="2 prompts"):
        ImageGrid("a", ("x",), np.zeros((2, 1, 8, 8)))
    with pytest.raises(ValueError, match="kind is 'euro'"):
        Aim("a", 1, kind="euro")
    with pytest.raises(ValueError, match="columns is 0"):
        tile(np.zeros((1, 8, 8)), columns=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunResults().title = "x"
