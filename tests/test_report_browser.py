"""The report in a real Chromium: what a reader sees, hears, presses, and what the page is kept from doing."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from tests.chromium import Browser, Page, find
from tests.report_factory import HOSTILE, write_hostile, write_with_pictures
from tests.scores_factory import random_rows, row, write_scores
from tests.tiny import write_tar
from zscore.report.job import ReportOptions, write_report
from zscore.tables import open_scores

pytestmark = [
    pytest.mark.skipif(find() is None, reason="needs Chromium"),
    pytest.mark.xdist_group("browser"),  # one process for all
]
NAMES = ("overall", "alignment", "realism", "aesthetics", "plausibility")
CHARTS = 5 + 3 + 1 + 4
"""Histograms, the threshold's three, correlation, uncertainty; the status chart comes on top where rows failed."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser.start(tmp_path_factory.mktemp("browser")) as started:
        yield started


def made(folder: Path, source: Path, **options: Any) -> Path:
    out = folder / "report.html"
    write_report(open_scores(str(source)), ReportOptions(out=str(out), **options))
    return out


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scores(tmp_path_factory.mktemp("table") / "scores.parquet", random_rows(4, rows=700, groups=90))


@pytest.fixture(scope="module")
def plain(table: Path) -> Path:
    return made(table.parent, table, top=4)


@pytest.fixture(scope="module")
def illustrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("illustrated")
    path, shards = write_with_pictures(folder)
    return made(folder, path, shards=(str(shards),))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    return made(folder, write_hostile(folder / "s.parquet"), title=HOSTILE[0], top=60)


@pytest.fixture
def page(browser: Browser, plain: Path) -> Iterator[Page]:
    opened = browser.open(plain)
    yield opened
    assert opened.complaints == []
    opened.close()


def text(page: Page, selector: str) -> str:
    return page.eval(f"document.querySelector({json.dumps(selector)}).textContent")


def set_threshold(page: Page, score: int, value: float) -> None:
    page.eval(
        f"""(() => {{
          const choice = document.getElementById("t-score"), slider = document.getElementById("t-value");
          choice.value = "{score}"; choice.dispatchEvent(new Event("change", {{bubbles: true}}));
          slider.value = "{value}"; slider.dispatchEvent(new Event("input", {{bubbles: true}}));
        }})()"""
    )


def shown(page: Page) -> dict[str, str]:
    names = ("shown", "kept", "share", "mean", "groups", "command", "name")
    return {name: text(page, f"#t-{name}") for name in names}


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (768, False), (375, True), (320, False)])
def test_it_is_quiet_and_fits(browser: Browser, illustrated: Path, width: int, dark: bool) -> None:
    page = browser.open(illustrated, width=width, height=800, dark=dark)
    assert page.complaints == []
    assert page.requests == [illustrated.resolve().as_uri()]
    assert page.eval("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    assert page.eval("document.documentElement.scrollWidth") <= width
    assert page.eval("document.querySelectorAll('.plot-box > svg').length") == CHARTS
    widths = page.eval("[...document.querySelectorAll('.plot-box > svg')].map(e => e.getBoundingClientRect().width)")
    assert all(100 < drawn < width for drawn in widths)
    background = page.eval("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(16, 19, 21)") == dark
    page.close()


def test_all_that_is_open_fits_a_phone_too(browser: Browser, hostile: Path) -> None:
    page = browser.open(hostile, width=375, height=800)
    page.eval("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    page.settle()
    assert page.eval("document.documentElement.scrollWidth") <= 375
    page.close()


def test_every_picture_is_shown(browser: Browser, illustrated: Path) -> None:
    page = browser.open(illustrated)
    seen = page.eval(
        """Promise.all([...document.querySelectorAll(".picture svg")].map(async (svg) => {
          const shown = svg.firstElementChild, first = document.getElementById((shown.getAttribute("href")).slice(1));
          await (shown.localName === "use" ? first : shown).decode();
          const box = svg.getBoundingClientRect();
          return [shown.localName, shown.getBBox().width, svg.getAttribute("aria-label"), box.width, box.height];
        }))"""
    )
    assert len(seen) >= 36
    assert {kind for kind, *_ in seen} == {"image", "use"}
    assert all(width == 64 and label.startswith("Picture ") for _, width, label, *_ in seen)
    assert all(width > 100 and height > 100 for *_, width, height in seen)
    page.close()


def test_a_picture_that_stands_elsewhere_is_drawn_again(browser: Browser, tmp_path: Path) -> None:
    """By the colour of the pixels, since a reference that leads nowhere is as large as one that leads somewhere."""
    folder = tmp_path / "red"
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (255, 0, 0)).save(buffer, "PNG")
    data = buffer.getvalue()
    write_tar(folder / "s.tar", [("k.png", data), ("k.txt", b"t")])
    path = write_scores(tmp_path / "s.parquet", [row(0, shard="s.tar", key="k", sha256=sha256(data).hexdigest())])
    for width in (1280, 375):
        page = browser.open(made(tmp_path, path, shards=(str(folder),)), width=width, height=800)
        for kind in ("image", "use"):
            at = page.eval(
                f"""(() => {{
                  const shown = document.querySelector(".picture {kind}");
                  shown.closest(".card").scrollIntoView({{block: "center", behavior: "instant"}});
                  const box = shown.closest("svg").getBoundingClientRect();
                  return [box.x + box.width / 2, box.y + box.height / 2];
                }})()"""
            )
            page.settle()
            page.screenshot(tmp_path / "shot.png", full=False)
            pixel = Image.open(tmp_path / "shot.png").convert("RGB").getpixel((int(at[0]), int(at[1])))
            assert isinstance(pixel, tuple)
            assert pixel[0] > 240
            assert max(pixel[1:]) < 20
        assert page.complaints == []
        page.close()


@pytest.mark.parametrize(
    "words",
    [
        {"error": "no picture in the sample: it has " + "0123456789abcdef" * 6 + ".json"},
        {"error": "/a" * 400},
        {"shard": "aesthetics_v2_6plus_part_000123_resized_512x512_final.tar"},
    ],
)
def test_a_failure_of_long_words_fits_a_phone(browser: Browser, tmp_path: Path, words: dict[str, str]) -> None:
    path = write_scores(tmp_path / "s.parquet", [row(0, status="bad_image", **words), row(1), row(2)])
    for width in (320, 375):
        page = browser.open(made(tmp_path, path), width=width, height=800)
        assert page.eval("document.documentElement.scrollWidth") <= width
        # What isn't long stays in one piece.
        pieces = "[...document.querySelectorAll('#status th code')].map(code => code.getClientRects().length)"
        assert page.eval(pieces) == [1, 1]
        page.close()


def test_the_slider_says_what_polars_says(page: Page, table: Path) -> None:
    frame = pl.read_parquet(table).filter(pl.col("status") == "ok")
    for score, threshold in itertools.product(range(5), (1.0, 2.35, 3.6, 4.45, 5.0)):
        set_threshold(page, score, threshold)
        name = NAMES[score]
        kept = frame.filter(pl.col(name) >= pl.lit(threshold, pl.Float32))
        mean = kept[name].cast(pl.Float64).mean()
        assert shown(page) == {
            "shown": f"{threshold:.2f}",
            "name": name,
            "kept": f"{kept.height:,}",
            "share": f"{kept.height / frame.height:.1%}",
            "groups": f"{kept['group'].n_unique():,} of {frame['group'].n_unique():,}",
            "mean": f"{mean:.2f}" if kept.height else "–",
            "command": f"zscore filter {table} --min {'' if name == 'overall' else name + '='}{threshold:.2f}",
        }
        check_means(page, frame, kept)


def check_means(page: Page, frame: pl.DataFrame, kept: pl.DataFrame) -> None:
    """The table of means of all and of the kept."""
    rows = page.eval("[...document.querySelectorAll('#t-table tr')].map(row => [...row.cells].map(c => c.textContent))")
    for name, line in zip(NAMES, rows, strict=True):
        everywhere = frame[name].cast(pl.Float64).mean()
        assert line[:2] == [name, f"{everywhere:.2f}"]
        if kept.is_empty():
            assert line[2:] == ["–", "–"]
            continue
        mean = kept[name].cast(pl.Float64).mean()
        assert float(line[2]) == pytest.approx(mean, abs=0.0051)
        assert float(line[3].replace("−", "-")) == pytest.approx(mean - everywhere, abs=0.0051)


def test_a_score_on_the_threshold_is_kept_as_by_filter(browser: Browser, tmp_path: Path) -> None:
    from zscore.criteria import FilterOptions
    from zscore.filters import FilterTargets, filter_scores

    bound = np.float32(3.7)
    means = [bound, np.nextafter(bound, np.float32(0)), np.nextafter(bound, np.float32(9)), 3.0, 5.0, 1.0]
    path = write_scores(tmp_path / "s.parquet", [row(n, means=[mean, 3, 3, 3]) for n, mean in enumerate(means)])
    page = browser.open(made(tmp_path, path))
    targets = FilterTargets(kept=str(tmp_path / "kept.parquet"))
    for threshold in (1.0, 3.65, 3.7, 3.75, 5.0):
        options = FilterOptions(minimum={"alignment": threshold})
        kept = filter_scores(open_scores(str(path)), options, targets, dry_run=True).kept
        set_threshold(page, 1, threshold)
        assert shown(page)["kept"] == str(kept)
    page.close()


def test_the_charts_follow_the_slider(page: Page) -> None:
    def drawn() -> list[str]:
        page.settle()
        return page.eval("['t-histogram', 't-shares', 't-means'].map(id => document.getElementById(id).innerHTML)")

    before = drawn()
    set_threshold(page, 0, 4.0)
    after = drawn()
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert "var(--dropped)" in after[0]
    set_threshold(page, 0, 1.0)
    assert "var(--dropped)" not in drawn()[0]


def test_buttons_keep_about_the_best(page: Page, table: Path) -> None:
    scores = pl.read_parquet(table).filter(pl.col("status") == "ok")["overall"]
    for share in (50, 30, 10):
        page.eval(f"document.querySelector('[data-share=\"{share}\"]').click()")
        at = float(shown(page)["shown"])
        distances = [
            abs(float((scores.to_numpy() >= np.float32(stop)).mean()) - share / 100)
            for stop in (at - 0.05, at, at + 0.05)
        ]
        assert distances[1] == min(distances)


def test_the_keyboard_reaches_everything(page: Page) -> None:
    page.press("Tab")
    assert page.eval("document.activeElement.className") == "skip"
    assert page.eval("document.activeElement.getBoundingClientRect().top") >= 0
    page.press("Enter")
    assert page.eval("document.activeElement.id") == "main"
    seen = []
    for _ in range(30):
        page.press("Tab")
        seen.append(page.eval("document.activeElement.id || document.activeElement.tagName"))
        outline = page.eval("getComputedStyle(document.activeElement).outlineStyle")
        assert outline not in {"none", ""}, seen[-1]
        if "t-command" in seen:
            break
    assert [name for name in seen if name.startswith("t-") or name == "BUTTON"] == [
        "t-score",
        "t-value",
        "BUTTON",
        "BUTTON",
        "BUTTON",
        "t-command",
    ]


def test_arrow_keys_move_the_slider_by_a_step_and_it_is_read_aloud(page: Page, table: Path) -> None:
    page.eval("document.getElementById('t-value').focus()")
    set_threshold(page, 0, 3.0)
    page.press("ArrowRight", 3)
    seen = shown(page)
    assert seen["shown"] == "3.15"
    scores = pl.read_parquet(table).filter(pl.col("status") == "ok")["overall"]
    kept = int((scores.to_numpy() >= np.float32(3.15)).sum())
    assert seen["kept"] == f"{kept}"
    assert page.eval("document.getElementById('t-value').getAttribute('aria-valuetext')") == (
        f"3.15, keeps {kept / len(scores):.1%}"
    )
    page.eval("new Promise(done => setTimeout(done, 450))")
    spoken = text(page, "#t-status")
    assert spoken.startswith(f"overall of at least 3.15 keeps {kept} of {len(scores)} pictures")
    page.press("End")
    assert shown(page)["shown"] == "5.00"


def test_screen_readers_find_their_way(page: Page) -> None:
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    nodes = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    roles = {role for role, _ in nodes}
    assert {"main", "navigation", "banner", "heading", "slider", "combobox", "table", "status"} <= roles
    regions = [name for role, name in nodes if role == "region"]
    for name in ("Status", "Scores", "Threshold", "Agreement between dimensions", "Uncertainty against score", "Best"):
        assert name in regions
    assert ("slider", "At least") in [(role, name.split("  ")[0][:8]) for role, name in nodes]
    for role, name in nodes:
        if role in {"img", "image", "slider", "combobox", "button", "link", "table", "region", "navigation", "article"}:
            assert name or role == "article", (role, name)
    charts = [name for role, name in nodes if role in {"img", "image"} and name.startswith("Histogram of")]
    assert len(charts) == 6
    levels = page.eval("[...document.querySelectorAll('h1,h2,h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.eval("document.documentElement.lang") == "en"
    # Else every step of the slider would be read aloud twice.
    entries = [entry for node in tree if node["role"]["value"] == "status" for entry in node.get("properties", [])]
    assert [entry["value"]["value"] for entry in entries if entry["name"] == "live"].count("polite") == 1


def test_what_a_chart_shows_stands_in_a_table(page: Page, table: Path) -> None:
    frame = pl.read_parquet(table).filter(pl.col("status") == "ok")
    page.eval("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    tables = page.eval("[...document.querySelectorAll('table')].map(table => table.innerText)")
    for words in ("bad_image", "std", "At least", "alignment", "90% under"):
        assert any(words in found for found in tables)
    assert f"{frame['realism'].median():.2f}" in tables[1]


def test_in_dark_and_light_text_stands_out(browser: Browser, illustrated: Path) -> None:
    contrast = """(() => {
      const light = (channel) => channel <= 10 ? channel / 3294.6 : ((channel / 255 + .055) / 1.055) ** 2.4;
      const luminance = (rgb) => rgb.match(/[\\d.]+/g).map(Number).slice(0, 3).map(light)
        .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
      const background = (element) => {
        for (; element; element = element.parentElement) {
          const colour = getComputedStyle(element).backgroundColor;
          if (!/, 0\\)$/.test(colour) && colour !== "transparent") return colour;
        }
      };
      let worst = [99, ""];
      for (const element of document.querySelectorAll("main *, header *, nav *, .plot-box text")) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
        if (!own || element.closest("script, style") || !element.getClientRects().length) continue;
        const style = getComputedStyle(element);
        const colour = element instanceof SVGElement && style.fill !== "none" ? style.fill : style.color;
        const [a, b] = [luminance(colour), luminance(background(element))].sort((x, y) => y - x);
        const ratio = (a + .05) / (b + .05);
        if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 120)];
      }
      return worst;
    })()"""
    for dark in (False, True):
        page = browser.open(illustrated, dark=dark)
        ratio, where = page.eval(contrast)
        assert ratio >= 4.5, where
        page.close()


def test_motion_is_left_out_where_it_isnt_wanted(browser: Browser, plain: Path) -> None:
    for reduced, expected in ((True, "auto"), (False, "smooth")):
        page = browser.open(plain, reduced=reduced)
        assert page.eval("getComputedStyle(document.documentElement).scrollBehavior") == expected
        page.close()


def test_charts_fit_again_when_the_window_changes(browser: Browser, plain: Path) -> None:
    page = browser.open(plain, width=1280)
    page.call("Emulation.setDeviceMetricsOverride", width=375, height=800, deviceScaleFactor=1, mobile=True)
    page.settle()
    page.settle()
    assert page.eval("document.documentElement.scrollWidth") <= 375
    assert page.eval("document.querySelector('#score-0 svg').getAttribute('width') <= 343")
    assert page.complaints == []
    page.close()


def test_markup_in_a_table_is_shown_and_not_run(browser: Browser, hostile: Path) -> None:
    page = browser.open(hostile)
    page.eval("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    for score in (1, 2):
        set_threshold(page, score, 3.0)
    page.eval("document.querySelectorAll('main *').forEach(e => e.dispatchEvent(new MouseEvent('mouseover')))")
    page.settle()
    assert page.eval("window.pwned") is None
    assert page.dialogs == 0
    assert page.complaints == []
    assert page.requests == [hostile.resolve().as_uri()]
    assert page.eval("document.querySelectorAll('script').length") == 5
    assert (
        page.eval("document.querySelectorAll('main img, iframe, base, meta[http-equiv=refresh], main link').length")
        == 0
    )
    assert (
        page.eval("[...document.querySelectorAll('*')].some(e => [...e.attributes].some(a => a.name.startsWith('on')))")
        is False
    )
    prompts = page.eval("[...document.querySelectorAll('.card .prompt')].map(e => e.textContent.trim())")
    for written in HOSTILE:
        seen = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\u202a-\u202e]", lambda one: f"\\u{ord(one[0]):04x}", written)
        assert any(seen in prompt for prompt in prompts), written
    assert page.eval("document.title") == HOSTILE[0]
    assert HOSTILE[0] in page.eval("[...document.getElementById('t-score').options].map(o => o.text)")
    page.close()


def test_the_suggested_command_is_safe_to_paste(browser: Browser, hostile: Path) -> None:
    import shlex

    page = browser.open(hostile)
    for score, name in ((1, HOSTILE[0]), (2, HOSTILE[4])):
        set_threshold(page, score, 3.0)
        words = shlex.split(shown(page)["command"])
        assert words[-2:] == ["--min", f"{name}=3.00"]
    page.close()


@pytest.mark.parametrize(
    "code",
    [
        "const e = document.createElement('script'); e.textContent = 'window.pwned = 1'; document.body.append(e)",
        "document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"window.pwned = 1\">')",
        "fetch('https://example.com/').then(() => { window.pwned = 1; }, () => {})",
        "const e = new Image(); e.onload = () => { window.pwned = 1; }; e.src = 'https://example.com/x.png'",
        "const e = document.createElement('iframe'); e.src = 'https://example.com/'; document.body.append(e)",
        "const e = document.createElement('form'); e.action = 'https://a.test/'; document.body.append(e); e.submit()",
    ],
)
def test_the_policy_stops_what_would_slip_through(browser: Browser, plain: Path, code: str) -> None:
    page = browser.open(plain)
    page.eval(f"(() => {{ {code} }})()")
    page.eval("new Promise(done => setTimeout(done, 100))")
    assert page.eval("window.pwned") is None
    assert any("Content Security Policy" in complaint for complaint in page.complaints)
    sent = [url for url in page.requests if url.startswith("http")]
    blocked = [url for url in page.failures if url.startswith("http")]
    assert sent == blocked
    page.close()


def test_without_scripts_the_numbers_are_there(browser: Browser, plain: Path) -> None:
    page = browser.open(plain, scripts=False)
    assert page.eval("document.getElementById('threshold-live').hidden") is True
    assert page.eval("document.querySelectorAll('table').length") >= 5
    assert page.eval("getComputedStyle(document.querySelector('noscript')).display") != "none"
    assert page.complaints == []
    page.close()


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(0, status="bad_image"), row(1, status="bad_text")],
        [row(0, means=4)],
        [row(0, means=3), row(1, means=3)],
    ],
)
def test_tables_of_next_to_nothing_make_a_page(browser: Browser, tmp_path: Path, rows: list[Any]) -> None:
    page = browser.open(made(tmp_path, write_scores(tmp_path / "s.parquet", rows)), width=375)
    assert page.complaints == []
    assert page.eval("[...document.querySelectorAll('.plot-box')].every(box => box.querySelector('svg'))")
    assert page.eval("document.documentElement.scrollWidth") <= 375
    page.close()
