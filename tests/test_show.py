"""`zscore show`: what it computes, and what reaches the terminal."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.scores_factory import (
    blank,
    metadata_in,
    random_rows,
    read_rows,
    rewrite,
    row,
    spoil,
    two,
    without,
    write_parts,
    write_scores,
    zscore,
)
from zscore.cli.render import plain
from zscore.errors import UsageError
from zscore.overview import head, one_row, overview, rows_with_key
from zscore.tables import Scores, open_scores


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def opened(path: Path) -> Scores:
    return open_scores(str(path))


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def gap(path: Path) -> None:
    """Null for the first level of a distribution."""
    table, metadata = pq.read_table(path), metadata_in(path)
    place = table.schema.get_field_index("alignment_probs")
    values = table["alignment_probs"].to_pylist()
    values[0] = [None, *values[0][1:]]
    column = pa.array(values, type=table.schema.field(place).type)
    rewrite(table.set_column(place, table.schema.field(place), column), path, metadata)


class TestOverview:
    def test_against_plain_python(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", random_rows(rows=150, groups=17))
        rows = read_rows(path)
        found = overview(opened(path))
        assert found.rows == 150
        assert found.statuses == {
            status: sum(made["status"] == status for made in rows) for status in ("ok", "bad_image")
        }
        assert found.groups == len({made["group"] for made in rows})
        assert found.pictures == len({made["sha256"] for made in rows}) < 150
        assert found.nonfinite == {}
        assert [spread.name for spread in found.spreads] == [
            "overall",
            "alignment",
            "realism",
            "aesthetics",
            "plausibility",
        ]
        for spread in found.spreads:
            values = [made[spread.name] for made in rows if made["status"] == "ok"]
            assert spread.mean == pytest.approx(statistics.fmean(values))
            assert spread.std == pytest.approx(statistics.pstdev(values))
            assert (spread.smallest, spread.largest) == (min(values), max(values))
            quarters = np.quantile(values, [0.25, 0.5, 0.75])
            assert [spread.quarter, spread.median, spread.three_quarters] == pytest.approx(quarters)

    def test_nan_is_counted_and_left_out(self, tmp_path: Path) -> None:
        made = [row(0, means=[math.nan, 2, 2, 2]), row(1, means=4), row(2, means=[math.inf, 3, 3, 3])]
        found = overview(opened(write_scores(tmp_path / "s.parquet", made)))
        assert found.nonfinite == {"overall": 2, "alignment": 2}
        assert found.spreads[1].mean == 4

    def test_null_is_no_group_and_no_picture(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(n, group=f"g{n % 2}") for n in range(4)])
        blank(blank(path, "sha256", [3]), "group", [0, 2])
        found = overview(opened(path))
        assert (found.groups, found.pictures) == (1, 3)
        blank(blank(path, "sha256", range(4)), "group", range(4))
        found = overview(opened(path))
        assert (found.groups, found.pictures) == (0, 0)

    def test_no_rows_and_no_scores(self, tmp_path: Path) -> None:
        for rows in ([], [row(0, status="bad_image")]):
            found = overview(opened(write_scores(tmp_path / "s.parquet", rows)))
            assert found.rows == len(rows)
            assert found.spreads == ()

    def test_order_of_statuses(self, tmp_path: Path) -> None:
        names = ["bad_image", "missing_prompt", "missing_prompt", "ok"]
        path = write_scores(tmp_path / "s.parquet", [row(n, status=name) for n, name in enumerate(names)])
        assert list(overview(opened(path)).statuses) == ["ok", "missing_prompt", "bad_image"]

    def test_head(self, tmp_path: Path) -> None:
        scores = opened(write_scores(tmp_path / "s.parquet", [row(n, rubric=two()) for n in range(5)], two()))
        assert head(scores, 3).columns == ["shard", "key", "prompt", "overall", "left", "right"]
        assert head(scores, 3)["key"].to_list() == ["k00000", "k00001", "k00002"]
        assert head(scores, 10**30).height == 5
        mixed = opened(write_scores(tmp_path / "m.parquet", [row(0), row(1, status="bad_image")]))
        assert "status" in head(mixed, 2).columns
        assert "status" not in head(mixed, 1).columns

    def test_head_without_overall_has_the_dimensions(self, tmp_path: Path) -> None:
        scores = opened(write_scores(tmp_path / "s.parquet", [row(0, rubric=two())], two()))
        assert head(without(scores, "overall"), 1).columns == ["shard", "key", "prompt", "left", "right"]
        bare = without(scores, "overall", "left", "right")
        assert head(bare, 1).columns == ["shard", "index", "key", "prompt", "group", "status"]


class TestOneRow:
    @pytest.fixture
    def scores(self, tmp_path: Path) -> Scores:
        made = [row(n, shard=f"s-{n // 2}.tar", index=n % 2, key=f"k{n % 2}", width=n) for n in range(6)]
        made[0] = row(0, shard="s-0.tar", key="k0", width=0, status="bad_image")
        return opened(write_scores(tmp_path / "s.parquet", made))

    @pytest.mark.parametrize(
        ("wanted", "width"),
        [
            ({}, 1),
            ({"number": 0}, 0),
            ({"number": 4}, 4),
            ({"number": -1}, 5),
        ],
    )
    def test_found(self, scores: Scores, wanted, width: int) -> None:
        found = one_row(scores, **wanted)
        assert found is not None
        assert found["width"] == width

    @pytest.mark.parametrize(
        ("wanted", "said"),
        [
            (6, r"--row 6: .*s\.parquet has 6 rows, numbered from 0"),
            (-7, "--row -7"),
            (10**30, "--row 1000000"),
            (-(10**30), "--row -1000000"),
        ],
    )
    def test_not_found(self, scores: Scores, wanted: int, said: str) -> None:
        with pytest.raises(UsageError, match=said):
            one_row(scores, number=wanted)

    @pytest.mark.parametrize(("key", "numbers"), [("k1", [1, 3, 5]), ("s-2.tar/k1", [5]), ("s-0.tar/k0", [0])])
    def test_a_key_may_name_several_rows(self, scores: Scores, key: str, numbers: list[int]) -> None:
        assert rows_with_key(scores, key) == numbers

    def test_an_unknown_key(self, scores: Scores) -> None:
        with pytest.raises(UsageError, match="--key k9: .* has no such row; give KEY or SHARD/KEY"):
            rows_with_key(scores, "k9")

    def test_a_table_of_failures_shows_its_first(self, tmp_path: Path) -> None:
        scores = opened(write_scores(tmp_path / "s.parquet", [row(3, status="bad_image")]))
        found = one_row(scores)
        assert found is not None
        assert found["key"] == "k00003"
        assert one_row(opened(write_scores(tmp_path / "e.parquet", []))) is None


class TestCommand:
    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def test_everything(self, here: Path, capsys) -> None:
        write_scores(here / "scores.parquet", random_rows(rows=100, groups=15), extra={"reasoning": ["because"] * 100})
        assert zscore("show") == 0
        shown = lines_of(capsys.readouterr().out)
        for line in (
            "rows 100",
            "groups 15",
            "rubric z-reward (alignment, realism, aesthetics, plausibility)",
            "levels 9 from 1 to 5",
            "model id made-up, weights 000000000000…",
            "the first 10 rows",
            "one row in full",
            "reasoning because",
        ):
            assert line in shown
        made = next(one for one in read_rows(here / "scores.parquet") if one["status"] == "ok")
        assert f"sha256 {made['sha256']}" in shown
        bars = [line for line in shown if re.search(r"\d\.\d\d +\d+\.\d%", line)]
        assert len(bars) == 36
        assert bars[0].startswith(f"alignment_probs 1.00 {made['alignment_probs'][0]:.1%}")

    def test_a_bar_is_as_long_as_its_probability(self, here: Path, capsys) -> None:
        probs = np.zeros((4, 9))
        probs[:, 0], probs[:, 8] = 0.25, 0.75
        write_scores(here / "scores.parquet", [row(0, probs=probs)])
        assert zscore("show", "--rows", 0) == 0
        shown = lines_of(capsys.readouterr().out)
        assert f"alignment_probs 1.00 25.0% {'█' * 10}" in shown
        assert f"5.00 75.0% {'█' * 30}" in shown
        assert not any("the first" in line for line in shown)

    def test_hostile_text_is_only_text(self, here: Path, capsys) -> None:
        prompt = "[red]a[/red]\n\x1b[31mcat\x07 \u202egnp [link=x]"
        write_scores(here / "scores.parquet", [row(0, prompt=prompt, key="k[bold]")])
        assert zscore("show") == 0
        shown = capsys.readouterr().out
        assert "[red]a[/red] \\u001b[31mcat\\u0007 \\u202egnp [link=x]" in shown
        assert "k[bold]" in shown
        assert not {"\x1b", "\x07", "\u202e"} & set(shown)
        assert plain("é 猫 ~") == "é 猫 ~"

    def test_long_prompts_are_cut_in_the_list_and_whole_below(self, here: Path, capsys, monkeypatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        words = " ".join(f"word{n}" for n in range(60))
        write_scores(here / "scores.parquet", [row(0, prompt=words), row(1, status="bad_image", prompt=words)])
        assert zscore("show") == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        listed = [line for line in shown.splitlines() if re.match(r" *s-0000", line)]
        assert len(listed) == 2
        assert "word59" in shown
        assert "–" in listed[1]

    def test_a_chosen_row(self, here: Path, capsys) -> None:
        write_parts(here / "parts", random_rows(rows=30))
        assert zscore("show", "parts", "--key", "s-0001.tar/k00012", "--rows", 2) == 0
        shown = lines_of(capsys.readouterr().out)
        assert "files 3" in shown
        assert "key k00012" in shown
        assert zscore("show", "parts", "--row", 29) == 0
        assert "key k00029" in lines_of(capsys.readouterr().out)

    def test_a_key_of_several_rows_is_told(self, here: Path, capsys) -> None:
        write_scores(here / "scores.parquet", [row(n, shard=f"{n}.tar", key="k") for n in range(3)])
        assert zscore("show", "--key", "k", "--rows", 0) == 0
        shown = lines_of(capsys.readouterr().out)
        assert "shard 0.tar" in shown
        assert "2 more rows are called 'k', the next is --row 1" in shown
        assert zscore("show", "--key", "1.tar/k", "--rows", 0) == 0
        assert "more rows" not in capsys.readouterr().out

    def test_what_has_no_number_is_called_so(self, here: Path, capsys) -> None:
        write_scores(here / "scores.parquet", [row(n) for n in range(4)])
        spoil(here / "scores.parquet", [(0, "overall", None), (1, "overall", math.inf), (2, "overall", math.nan)])
        assert zscore("show") == 0
        assert "overall missing, NaN or infinite 3" in lines_of(capsys.readouterr().out)

    def test_a_distribution_with_a_gap(self, here: Path, capsys) -> None:
        write_scores(here / "scores.parquet", [row(0)])
        gap(here / "scores.parquet")
        assert zscore("show") == 0
        assert "alignment_probs 1.00 –" in lines_of(capsys.readouterr().out)

    @pytest.mark.parametrize("values", [[0.5], [["a"] * 9], [None]])
    def test_a_foreign_column_that_is_called_like_a_distribution(self, here: Path, capsys, values) -> None:
        write_scores(here / "scores.parquet", [row(0)], extra={"my_probs": values})
        assert zscore("show") == 0
        said = {0.5: "0.5000", None: "–"}.get(values[0]) if not isinstance(values[0], list) else str(values[0])
        assert f"my_probs {said}" in lines_of(capsys.readouterr().out)

    @pytest.mark.parametrize("columns", [30, 40, 50, 60, 72, 100])
    def test_numbers_are_whole_on_a_narrow_terminal(self, here: Path, capsys, monkeypatch, columns: int) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        path = write_scores(here / "scores.parquet", random_rows(rows=40))
        scores = opened(path)
        assert zscore("show") == 0
        shown = capsys.readouterr().out
        assert shown.isprintable() or "\n" in shown
        for spread in overview(scores).spreads:
            numbers = (spread.mean, spread.std, spread.smallest, spread.quarter, spread.median, spread.largest)
            (line,) = [line for line in shown.splitlines() if f" {spread.mean:.3f} " in line]
            assert all(f"{number:.3f}" in line.split() for number in numbers)
        listed = shown.partition("the first 10 rows")[2].partition("one row in full")[0]
        for made in head(scores, 10).to_dicts():
            assert f" {made['plausibility']:.2f}" in listed if made["overall"] is not None else True
        if columns >= 60:
            assert max(map(len, shown.splitlines())) <= columns

    def test_derived_tables(self, here: Path, capsys) -> None:
        write_scores(here / "scores.parquet", random_rows(rows=60, groups=6))
        assert zscore("filter", "--min", 2.9, "--dropped", "d.parquet", "-q") == 0
        assert zscore("select", "kept.parquet", "--pairs", "p.parquet", "-q") == 0
        for name, said in {
            "kept.parquet": "then filter min overall 2.9",
            "d.parquet": "reason",
            "best.parquet": "select_rank",
            "p.parquet": "chosen",
        }.items():
            assert zscore("show", name) == 0
            assert said in " ".join(lines_of(capsys.readouterr().out))

    def test_a_table_of_few_columns(self, here: Path, capsys) -> None:
        table = pq.read_table(write_scores(here / "s.parquet", [row(0)])).select(["width", "height"])
        rewrite(table, here / "few.parquet")
        assert zscore("show", "few.parquet") == 0
        assert "64 48" in lines_of(capsys.readouterr().out)

    def test_an_empty_table_says_so(self, here: Path, capsys) -> None:
        write_scores(here / "scores.parquet", [])
        assert zscore("show") == 0
        assert "scores.parquet has no rows" in capsys.readouterr().out

    def test_mixed_files_show_both_models(self, here: Path, capsys) -> None:
        write_scores(here / "a.parquet", [row(0)])
        write_scores(here / "b.parquet", [row(0, rubric=two())], two(), model={"id": "b", "weights": "w"})
        assert zscore("show", "a.parquet", "b.parquet") == 1
        assert "weren't scored alike: rubric" in capsys.readouterr().err
        assert zscore("show", "a.parquet", "b.parquet", "--allow-mixed") == 0
        assert "mixed model id made-up, weights 000000000000…; id b, weights w" in lines_of(capsys.readouterr().out)

    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (["nope.parquet"], 1, "there is no nope.parquet"),
            (["--row", "7"], 2, "--row 7: scores.parquet has 1 rows"),
            (["--row", str(10**30)], 2, "scores.parquet has 1 rows"),
            (["--key", "x"], 2, "--key x: scores.parquet has no such row"),
            (["--key", "k00000", "--row", "0"], 2, "--key and --row both name the row to show in full"),
        ],
    )
    def test_errors_are_one_line_and_nothing_else(self, here: Path, capsys, arguments, code: int, said: str) -> None:
        write_scores(here / "scores.parquet", [row(0)])
        assert zscore("show", *arguments) == code
        shown = capsys.readouterr()
        assert said in shown.err
        assert shown.err.count("\n") == 1
        assert shown.out == ""
