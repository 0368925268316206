from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from tests.report_factory import HOSTILE, write_hostile, write_noise, write_with_pictures
from tests.scores_factory import blank, metadata_in, random_rows, rewrite, row, two, write_parts, write_scores
from tests.tiny import png, write_tar
from zscore.cli.app import build_app
from zscore.errors import OutputError, TableError, UsageError, ZscoreError
from zscore.report.job import ReportOptions, ReportSummary, write_report
from zscore.report.page import policy
from zscore.report.pictures import MOST_BYTES, Thumbnail, Thumbnails
from zscore.report.provenance import facts_of
from zscore.tables import open_scores

VOID = {"meta", "link", "img", "input", "br", "path"}


class Reader(HTMLParser):
    """What a page is made of, and whether its elements are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside == "style":
            self.styles.append(data)
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def report(source: Path | str, out: Path, **options: Any) -> tuple[Reader, ReportSummary]:
    allow_mixed = options.pop("allow_mixed", False)
    summary = write_report(
        open_scores(str(source), allow_mixed=allow_mixed), ReportOptions(out=str(out / "report.html"), **options)
    )
    html = (out / "report.html").read_bytes()
    assert summary.size == len(html)
    return Reader(html.decode()), summary


def report_to(out: str, **options: Any) -> ReportSummary:
    return write_report(open_scores("scores.parquet"), ReportOptions(out=out, **options))


def test_a_page_says_what_is_in_the_table(tmp_path: Path) -> None:
    rows = random_rows(1, rows=80, groups=12)
    path = write_scores(tmp_path / "run-7.parquet", rows)
    page, summary = report(path, tmp_path)
    failed = sum(made.scores is None for made in rows)
    assert (summary.rows, summary.scored, summary.pictures, summary.faults) == (80, 80 - failed, 0, ())
    for words in ("Scores in run-7.parquet", "bad_image", "what was wrong with it", "z-reward", "made-up", "Best of N"):
        assert words in page.text
    assert page.data["rows"] == 80 - failed
    assert page.data["scores"] == ["overall", "alignment", "realism", "aesthetics", "plausibility"]


def test_the_same_table_gives_the_same_page(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.parquet", random_rows(1, rows=60))
    pages = []
    for _ in range(2):
        report(path, tmp_path)
        pages.append((tmp_path / "report.html").read_bytes())
    assert pages[0] == pages[1]


def spelled(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def test_nothing_in_a_table_becomes_markup(tmp_path: Path) -> None:
    plain, _ = report(write_scores(tmp_path / "plain.parquet", random_rows(1, rows=80)), tmp_path)
    page, _ = report(write_hostile(tmp_path / "hostile.parquet"), tmp_path, title=HOSTILE[1], top=60)
    assert set(page.tags) == set(plain.tags)
    assert page.tags.count("script") == plain.tags.count("script") == 5
    assert page.styles == plain.styles
    assert page.scripts[1:] == plain.scripts[1:]
    for _, name, _ in page.attributes:
        assert not name.startswith("on")
        assert name != "style"
    for text in HOSTILE:
        assert re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\u202a-\u202e]", spelled, text) in page.text
    assert "1337" not in page.text


def test_control_characters_are_spelled_out(tmp_path: Path) -> None:
    """They are invalid in HTML, steer a terminal that prints the page, and turn text around."""
    report(write_scores(tmp_path / "s.parquet", [row(0, prompt="a\x00b\x1b[31mc\u202ed\x07\te\nf")]), tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a\\u0000b\\u001b[31mc\\u202ed\\u0007" in html
    assert not set(html) & {"\x00", "\x1b", "\x07", "\u202e"}


def test_the_data_survives_a_script_element(tmp_path: Path) -> None:
    page, _ = report(write_hostile(tmp_path / "hostile.parquet"), tmp_path)
    assert page.data["scores"][1] == HOSTILE[0]
    assert "<" not in page.scripts[0]
    assert "\u2028" not in page.scripts[0]


def test_a_page_asks_for_nothing(tmp_path: Path) -> None:
    path, shards = write_with_pictures(tmp_path)
    page, summary = report(path, tmp_path, shards=(str(shards),))
    assert summary.pictures > 12
    assert summary.faults == ()
    assert page.tags.count("image") == summary.pictures
    assert page.tags.count("use") > 0
    for _, name, value in page.attributes:
        if name in {"src", "href", "srcset", "data", "action", "poster"}:
            assert value.startswith(("#", "data:"))


def test_the_policy_allows_what_the_page_holds_and_nothing_else(tmp_path: Path) -> None:
    page, _ = report(write_scores(tmp_path / "s.parquet", random_rows(1)), tmp_path)
    (content,) = [
        value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "src" in value
    ]
    assert content == policy()
    rules = dict(rule.strip().split(" ", 1) for rule in content.split(";"))
    assert (rules["default-src"], rules["img-src"], rules["base-uri"], rules["form-action"]) == (
        "'none'",
        "data:",
        "'none'",
        "'none'",
    )
    assert "unsafe" not in content

    def hashed(text: str) -> str:
        return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["script-src"].split() == [hashed(script) for script in page.scripts[1:]]
    assert rules["style-src"].split()[:1] == [hashed(page.styles[0])]


def test_an_empty_table_makes_a_page_that_says_so(tmp_path: Path) -> None:
    page, summary = report(write_scores(tmp_path / "s.parquet", []), tmp_path)
    assert (summary.rows, summary.scored) == (0, 0)
    assert "The table is empty" in page.text
    assert page.data == {"statuses": []}
    assert "svg" not in page.tags


def test_a_table_of_failures_makes_a_page_that_says_why(tmp_path: Path) -> None:
    rows = [row(n, status="missing_prompt" if n else "bad_image", error=f"why {n}") for n in range(5)]
    (tmp_path / "shard.tar").write_bytes(b"")
    path = write_scores(tmp_path / "s.parquet", rows)
    page, summary = report(path, tmp_path, shards=(str(tmp_path / "shard.tar"),))
    assert (summary.rows, summary.scored) == (5, 0)
    for words in ("No picture has a score", "missing_prompt", "why 1", "80.0%"):
        assert words in page.text


def test_ok_rows_without_numbers_are_told(tmp_path: Path) -> None:
    page, summary = report(write_scores(tmp_path / "s.parquet", [row(0), row(1, means=float("nan"))]), tmp_path)
    assert (summary.rows, summary.scored) == (2, 1)
    assert "1 rows say “ok” and lack a number" in page.text
    page, summary = report(write_scores(tmp_path / "s.parquet", [row(1, means=float("nan"))]), tmp_path)
    assert summary.scored == 0
    assert "No picture has a score" in page.text


def test_one_row_is_enough(tmp_path: Path) -> None:
    page, summary = report(write_scores(tmp_path / "s.parquet", [row(0, means=4)]), tmp_path)
    assert summary.scored == 1
    assert "No group has more than one scored picture" in page.text


def test_another_rubric_has_its_own_levels(tmp_path: Path) -> None:
    rows = [row(n, means=1 + n / 4, rubric=two()) for n in range(12)]
    page, _ = report(write_scores(tmp_path / "s.parquet", rows, two()), tmp_path)
    assert page.data["levels"] == [1, 2, 4]
    assert page.data["stops"][-1] == 4
    assert "left" in page.text


def test_a_folder_of_parts_is_one_table(tmp_path: Path) -> None:
    rows = random_rows(2, rows=60)
    whole, _ = report(write_scores(tmp_path / "s.parquet", rows), tmp_path)
    parts, summary = report(write_parts(tmp_path / "parts", rows), tmp_path, sources=("parts/",))
    assert summary.rows == 60
    assert {**parts.data, "command": ""} == {**whole.data, "command": ""}
    assert parts.data["command"] == "zscore filter parts/"


def test_urls_on_both_sides(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.parquet", random_rows(2, rows=30))
    files = fsspec.filesystem("memory")
    files.pipe("/in/s.parquet", path.read_bytes())
    summary = write_report(open_scores("memory://in/s.parquet"), ReportOptions(out="memory://out/page.html"))
    html = files.cat("/out/page.html")
    assert len(html) == summary.size
    assert "zscore filter memory://in/s.parquet" in Reader(html.decode()).data["command"]


def test_mixed_files_show_what_they_share(tmp_path: Path) -> None:
    write_scores(tmp_path / "t" / "a.parquet", [row(n, means=2 + n / 10) for n in range(8)])
    write_scores(
        tmp_path / "t" / "b.parquet", [row(n, means=1, rubric=two()) for n in range(8)], two(), layout="separate"
    )
    with pytest.raises(TableError, match="rubric"):
        report(tmp_path / "t", tmp_path)
    page, summary = report(tmp_path / "t", tmp_path, allow_mixed=True)
    assert summary.scored == 16
    assert page.data["scores"] == ["overall"]
    assert page.data["levels"] == []
    assert "Layout (mixed)" in page.text


def test_a_table_of_few_columns_shows_what_it_has(tmp_path: Path) -> None:
    import polars as pl

    path = write_scores(tmp_path / "s.parquet", random_rows(2, rows=40))
    table = pq.read_table(path)
    slim = table.select(["shard", "index", "key", "prompt", "status", "alignment"])
    pq.write_table(slim.replace_schema_metadata({b"zscore": json.dumps(metadata_in(path)).encode()}), path)
    page, summary = report(path, tmp_path)
    assert summary.scored == pl.read_parquet(path).filter(pl.col("status") == "ok").height
    assert page.data["scores"] == ["alignment"]
    assert page.data["uncertainty"] == []
    assert "Best of N" not in page.text
    assert "Most uncertain" not in page.text


def test_the_heading_is_what_the_user_called_the_table(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts", random_rows(2, rows=40))
    page, _ = report(parts, tmp_path, sources=(f"{parts}/",))
    assert "Scores in parts" in page.text
    page, _ = report(parts, tmp_path)
    assert "Scores in s-0000" in page.text
    assert "and 3 more" in page.text


def test_no_zero_has_a_sign(tmp_path: Path) -> None:
    rows = [row(n, means=[1 + n % 2, 1 + n // 2 % 2, 3, 3.001 - n / 1e6]) for n in range(8)]
    page, _ = report(write_scores(tmp_path / "s.parquet", rows), tmp_path)
    assert "0.00" in page.text
    assert "−0.00" not in page.text


def test_no_pictures_are_shown_when_none_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(b"nobody reads this")
    path = write_scores(tmp_path / "s.parquet", random_rows(2, rows=40))
    page, _ = report(path, tmp_path, top=0, shards=(str(tmp_path / "shard.tar"),))
    assert "article" not in page.tags
    assert "Best of N" in page.text


def embedded(page: Reader) -> list[str]:
    return [value for tag, name, value in page.attributes if (tag, name) == ("image", "href")]


def test_a_picture_that_is_shown_twice_is_in_the_page_once(tmp_path: Path) -> None:
    path, shards = write_with_pictures(tmp_path, samples=4)
    page, summary = report(path, tmp_path, shards=(str(shards),), top=8)
    pictures = embedded(page)
    assert len(pictures) == len(set(pictures)) == summary.pictures == 8
    names = [value for tag, name, value in page.attributes if (tag, name) == ("image", "id")]
    assert names == [f"picture-{n}" for n in range(1, 9)]
    referred = [value for tag, name, value in page.attributes if (tag, name) == ("use", "href")]
    shown = [value for tag, name, value in page.attributes if value.startswith("Picture ")]
    assert len(referred) == len(shown) - 8 > 0
    assert set(referred) <= {f"#{name}" for name in names}


def test_copies_of_a_picture_are_in_the_page_once(tmp_path: Path) -> None:
    digest = hashlib.sha256(png(1)).hexdigest()
    write_tar(tmp_path / "a.tar", [(f"k{n}.{s}", d) for n in range(3) for s, d in (("png", png(1)), ("txt", b"t"))])
    rows = [row(n, shard="a.tar", key=f"k{n}", sha256=digest, means=1 + n) for n in range(3)]
    page, summary = report(write_scores(tmp_path / "s.parquet", rows), tmp_path, shards=(str(tmp_path / "a.tar"),))
    assert (len(embedded(page)), summary.faults) == (1, ())


def test_a_page_of_noise_has_a_size_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, shards = write_noise(tmp_path, 24)
    bare, small = report(path, tmp_path, top=12)
    assert embedded(bare) == []
    for room in (1_000_000, 300_000, 170_000):
        monkeypatch.setattr("zscore.report.job.MOST_PAGE", small.size + room)
        page, summary = report(path, tmp_path, shards=(str(shards),), top=12)
        assert (summary.pictures, summary.faults) == (24, ())
        assert small.size < summary.size <= small.size + room
        assert len(embedded(page)) == 24


def test_the_most_pictures_leave_a_page_that_can_be_mailed(tmp_path: Path) -> None:
    """Of the largest thumbnails and the longest texts, without the minutes that it takes to make them."""
    from zscore.report import job

    texts = {"prompt": '"' * 2000, "key": "<" * 200}
    rows = [row(n, means=1 + 4 * (n * 97 % 480) / 479, group=f"g{n // 8}", **texts) for n in range(480)]
    scores = open_scores(str(write_scores(tmp_path / "s.parquet", rows)))
    seen: list[int] = []

    def largest(rows: Any, _shards: Any, _options: Any, most: int) -> Thumbnails:
        seen.append(most)
        encoded = [b64encode(n.to_bytes(4) + bytes(most - 4)).decode() for n in range(480)]
        made = [Thumbnail(f"data:image/webp;base64,{data}", 320, 320) for data in encoded]
        return Thumbnails({("s-0000.tar", n): thumbnail for n, thumbnail in enumerate(made)})

    (tmp_path / "s-0000.tar").write_bytes(b"")
    options = ReportOptions(out=str(tmp_path / "r.html"), shards=(str(tmp_path / "s-0000.tar"),), top=job.MOST_TOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zscore.report.job.read_thumbnails", largest)
        summary = write_report(scores, options)
    assert 4_000 < seen[0] < MOST_BYTES
    assert 8_000_000 < summary.size <= 10_000_000


def test_long_errors_and_metadata_leave_a_page_that_can_be_mailed(tmp_path: Path) -> None:
    rows = [row(0), row(1, status="bad_image", error="e" * 11_000_000)]
    steps = [{"command": "filter", "criteria": {"min": "m" * 3_000_000}}] * 4
    path = write_scores(tmp_path / "s.parquet", rows, derived=steps, note="n" * 11_000_000)
    page, summary = report(path, tmp_path)
    assert summary.size < 2_000_000
    assert "eee…" in page.text
    assert "mmm…" in page.text


def test_files_that_were_scored_with_other_options_have_pictures(tmp_path: Path) -> None:
    for name, keys in (("a", "png"), ("b", "out.png")):
        members = [("k.png", png(1)), ("k.out.png", png(2)), ("k.txt", b"t")]
        write_tar(tmp_path / "shards" / f"{name}.tar", members)
        digest = hashlib.sha256(png(1 if keys == "png" else 2)).hexdigest()
        rows = [row(0, shard=f"{name}.tar", key="k", sha256=digest, means=2 if name == "a" else 3)]
        options = {"image_keys": keys, "max_text_bytes": 1000 + len(keys)}
        write_scores(tmp_path / "t" / f"{name}.parquet", rows, options=options)
    _, summary = report(tmp_path / "t", tmp_path, shards=(str(tmp_path / "shards"),))
    assert (summary.pictures, summary.faults) == (2, ())


@pytest.mark.parametrize("column", ["index", "shard", "key", "prompt", "group", "sha256", "width", "error"])
def test_a_null_anywhere_makes_a_page(tmp_path: Path, column: str) -> None:
    path, shards = write_with_pictures(tmp_path)
    blank(path, column, range(0, 24, 2))
    page, summary = report(path, tmp_path, shards=(str(shards),), top=60)
    assert summary.scored == 24
    missing = page.text.count("the row doesn't say which sample it is")
    assert (missing > 0) == (column in {"index", "shard"})
    assert "sample None" not in page.text.partition("Provenance")[0].partition("Best")[2]


def test_a_candidate_of_another_prompt_shows_it(tmp_path: Path) -> None:
    rows = [row(n, group="g", means=4 - n, prompt="a cat" if n != 1 else "a dog") for n in range(3)]
    page, _ = report(write_scores(tmp_path / "s.parquet", rows), tmp_path)
    _, _, groups = page.text.partition("groups have more than one scored picture")
    groups, _, _ = groups.partition("The rubric in full")
    # The heading alone, where it is the card's own.
    assert (groups.count("a cat"), groups.count("a dog")) == (1, 1)


def test_a_mixed_table_is_filtered_as_one(tmp_path: Path) -> None:
    write_scores(tmp_path / "t" / "a.parquet", [row(0)])
    write_scores(tmp_path / "t" / "b.parquet", [row(1)], layout="separate")
    page, _ = report(tmp_path / "t", tmp_path, allow_mixed=True, sources=("my t/",))
    assert page.data["command"] == "zscore filter 'my t/' --allow-mixed"
    page, _ = report(tmp_path / "t" / "a.parquet", tmp_path, allow_mixed=True, sources=("a.parquet",))
    assert page.data["command"] == "zscore filter a.parquet"


def test_a_rubric_without_its_text_is_no_fault(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.parquet", [row(0)])
    assert "The rubric in full" in report(path, tmp_path)[0].text
    metadata = metadata_in(path)
    del metadata["rubric"]["source"]
    rewrite(pq.read_table(path), path, metadata)
    assert "The rubric in full" not in report(path, tmp_path)[0].text


@pytest.mark.parametrize("options", [None, [], "odd", {"image_keys": 5}])
def test_odd_options_cost_nothing(tmp_path: Path, options: Any) -> None:
    path, shards = write_with_pictures(tmp_path)
    rewrite(pq.read_table(path), path, {**metadata_in(path), "options": options})
    assert report(path, tmp_path, shards=(str(shards),))[1].faults == ()


def test_pictures_that_are_gone_leave_a_notice(tmp_path: Path) -> None:
    path, shards = write_with_pictures(tmp_path)
    (shards / "t-0000.tar").write_bytes((shards / "t-0001.tar").read_bytes())
    page, summary = report(path, tmp_path, shards=(str(shards),))
    assert summary.faults
    assert summary.pictures
    assert "couldn’t be shown" in page.text
    assert summary.faults[0] in page.text


@pytest.mark.parametrize("top", [-1, 61])
def test_top_has_limits(top: int) -> None:
    with pytest.raises(UsageError, match="--top"):
        ReportOptions(out="r.html", top=top)


def test_the_page_is_never_written_over_the_table(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.parquet", [row(0)])
    before = path.read_bytes()
    for out in (str(path), f"{tmp_path}/./s.parquet", str(tmp_path), f"{tmp_path}/"):
        with pytest.raises(UsageError):
            write_report(open_scores(str(path)), ReportOptions(out=out))
    assert path.read_bytes() == before


@pytest.mark.parametrize("given", ["shards", "shards/t-0000.tar", "shards/t-{0000..0001}.tar"])
@pytest.mark.parametrize("out", ["shards/t-0000.tar", "shards/../shards/t-0000.tar", "soft.tar", "hard.tar"])
@pytest.mark.parametrize("top", [0, 12])
def test_the_page_is_never_written_over_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, out: str, top: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write_with_pictures(tmp_path)
    (tmp_path / "soft.tar").symlink_to("shards/t-0000.tar")
    (tmp_path / "hard.tar").hardlink_to("shards/t-0000.tar")
    before = (tmp_path / "shards" / "t-0000.tar").read_bytes()
    monkeypatch.setattr("zscore.report.job.read_statuses", lambda _: pytest.fail("the table was read"))
    with pytest.raises(UsageError, match=r"--out .*tar is the shard .*shards/t-0000.tar that is read"):
        report_to(out, shards=(given,), top=top)
    assert (tmp_path / "shards" / "t-0000.tar").read_bytes() == before


def test_the_page_is_never_written_over_a_remote_shard(tmp_path: Path) -> None:
    path, shards = write_with_pictures(tmp_path)
    fsspec.filesystem("memory").pipe("/sh/t-0000.tar", (shards / "t-0000.tar").read_bytes())
    with pytest.raises(UsageError, match=r"is the shard memory://.*t-0000\.tar"):
        write_report(
            open_scores(str(path)), ReportOptions(out="memory://sh/t-0000.tar", shards=("memory://sh/t-0000.tar",))
        )


@pytest.mark.parametrize("scheme", ["memory:///", "memory://"])
def test_the_page_is_never_written_over_a_shard_by_another_spelling(tmp_path: Path, scheme: str) -> None:
    fsspec.filesystem("memory").pipe_file("/spelled/a.tar", b"shard")
    path = write_scores(tmp_path / "s.parquet", [row(0)])
    options = ReportOptions(out="memory://spelled/a.tar", shards=(f"{scheme}spelled/a.tar",))
    with pytest.raises(UsageError, match="is the shard"):
        write_report(open_scores(str(path)), options)


@pytest.mark.parametrize("source", ["parts", "parts/*.parquet"])
def test_the_page_never_becomes_a_part_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_parts(tmp_path / "parts", random_rows(2, rows=20))
    with pytest.raises(UsageError, match="from then on"):
        write_report(open_scores(source), ReportOptions(out="parts/report.parquet"))
    assert write_report(open_scores(source), ReportOptions(out="parts/report.html")).rows == 20


def test_a_page_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_scores(tmp_path / "s.parquet", random_rows(2, rows=20))
    (tmp_path / "report.html").write_text("before")
    (tmp_path / "closed").write_text("a file, not a folder")
    with pytest.raises(OutputError):
        write_report(open_scores(str(path)), ReportOptions(out=str(tmp_path / "closed" / "report.html")))

    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("zscore.report.job.render", fail)
    with pytest.raises(KeyboardInterrupt):
        report(path, tmp_path)
    assert (tmp_path / "report.html").read_text() == "before"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["closed", "report.html", "s.parquet"]


def test_facts_leave_out_what_isnt_said() -> None:
    assert facts_of({}) == []
    facts = dict(
        facts_of(
            {
                "created": "2026-01-01T00:00:00+00:00",
                "finished": "2026-01-02T01:01:00+00:00",
                "shards": 1200,
                "max_pixels": 1_048_576,
                "derived": [{"command": "filter", "criteria": {"min": {"overall": 4}}}, "odd"],
                "mixed_engine": [{"name": "a"}, {"name": "b"}],
                "rubric": "odd",
            }
        )
    )
    assert facts == {
        "Shards": "1,200",
        "Image budget": "1,048,576 pixels",
        "Scored": "2026-01-02 01:01 UTC, after 1 d, 1:01:00 h",
        "Engine (mixed)": "2 different ones",
        "Step 1": "zscore filter: min {'overall': 4}",
        "Step 2": "odd",
    }
    assert dict(facts_of({"created": "yesterday", "finished": "today"}))["Scored"] == "yesterday to today"


@pytest.fixture
def app() -> typer.Typer:
    return build_app()


def test_the_command_writes_a_page(app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_with_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", "--shards", "shards", "--title", "Run 7", "--top", "4"])
    assert done.exit_code == 0, done.output
    assert re.fullmatch(r"wrote report.html: 24 rows, 24 scored, \d+ thumbnails, 0\.\d MB\n", done.stdout)
    page = Reader((tmp_path / "report.html").read_text())
    assert "Run 7" in page.text
    assert page.data["command"] == "zscore filter scores.parquet"
    quiet = CliRunner().invoke(app, ["report", "scores.parquet", "--quiet", "-o", "other.html"])
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert "Run 7" not in (tmp_path / "other.html").read_text()


def test_no_model_library_is_loaded(tmp_path: Path) -> None:
    path, shards = write_with_pictures(tmp_path)
    code = (
        "import sys; from zscore.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    arguments = ["report", path, "--shards", shards, "--out", tmp_path / "r.html"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "vllm", "triton", "scipy", "matplotlib"} & set(done.stdout.split())


def test_the_command_tells_of_pictures_that_it_cant_show(app: typer.Typer, tmp_path: Path) -> None:
    path, shards = write_with_pictures(tmp_path)
    (shards / "t-0001.tar").write_bytes(b"x" * 2048)
    done = CliRunner().invoke(app, ["report", str(path), "--shards", str(shards), "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 0
    assert done.stderr.startswith("zscore: no picture: ")
    assert "t-0001.tar" in done.stderr


def test_names_of_members_cant_steer_the_terminal(app: typer.Typer, tmp_path: Path) -> None:
    shard = tmp_path / "shards" / "t\x1b]0;PWNED\x07\x1b[31m.tar"
    write_tar(shard, [("a\x9b31m.png", b"garbage"), ("a\x9b31m.txt", b"t"), ("b.png", png(1)), ("b.txt", b"t")])
    rows = [
        row(0, shard=shard.name, key="a\x9b31m", sha256=hashlib.sha256(b"garbage").hexdigest()),
        row(1, shard=shard.name, key="b\x1b[2J", means=2),
    ]
    path = write_scores(tmp_path / "s.parquet", rows)
    arguments = ["report", str(path), "--shards", str(shard.parent), "--out", str(tmp_path / "r.html")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert done.stderr.count("zscore: no picture: ") == 2
    assert "\\u001b]0;PWNED\\u0007" in done.stderr
    assert not {"\x1b", "\x07", "\x9b"} & set(done.output)


def test_the_command_says_that_nothing_was_scored(app: typer.Typer, tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.parquet", [row(0, status="bad_image")])
    done = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 0
    assert "no row has a score: the page says why" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["missing.parquet"], TableError, "there is no missing.parquet"),
        (["s.parquet", "--top", "100"], UsageError, "--top 100"),
        (["s.parquet", "--shards", "missing/"], UsageError, "missing"),
        (["s.parquet", "--shards", "missing/", "--top", "0"], UsageError, "missing"),
        (["s.parquet", "--out", "s.parquet"], UsageError, "the table that is read"),
        (["s.parquet", "--shards", "a.tar", "--out", "a.tar"], UsageError, "--out a.tar is the shard"),
        (["s.parquet", "--out", "memory-less://x/r.html"], UsageError, "memory-less"),
    ],
)
def test_errors_are_ours(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], kind: type, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_scores(tmp_path / "s.parquet", [row(0)])
    (tmp_path / "a.tar").write_bytes(b"")
    done = CliRunner().invoke(app, ["report", *arguments])
    assert isinstance(done.exception, kind), done.exception
    assert isinstance(done.exception, ZscoreError)
    assert words in str(done.exception)
    assert not (tmp_path / "report.html").exists()
