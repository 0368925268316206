from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from tests.scores_factory import metadata_in, random_rows, rewrite, row, two, without, write_scores
from zscore.criteria import FilterOptions
from zscore.errors import TableError
from zscore.filters import FilterTargets, filter_scores
from zscore.records import Status
from zscore.report.columns import Columns, columns_of
from zscore.report.summary import (
    MOST_STOPS,
    WIDTH_BINS,
    Grid,
    Numbers,
    correlations,
    count_pictures,
    count_unscored,
    describe,
    grid_for,
    read_numbers,
    read_statuses,
    threshold_bins,
    uncertainty,
)
from zscore.report.tables import threshold_table
from zscore.tables import Scores, open_scores

NAMES = ("overall", "alignment", "realism", "aesthetics", "plausibility")
Z_GRID = Grid.over(1, 5)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return open_scores(str(write_scores(tmp_path_factory.mktemp("t") / "scores.parquet", random_rows(3, rows=400))))


@pytest.fixture(scope="module")
def numbers(table: Scores) -> Numbers:
    return read_numbers(table, columns_of(table))


def of_scores(**scores: list[float]) -> Numbers:
    arrays = {name: np.asarray(values, np.float32) for name, values in scores.items()}
    rows = len(next(iter(arrays.values())))
    return Numbers(np.arange(rows, dtype=np.uint32), arrays, {})


def test_the_grid_of_the_usual_levels_has_steps_of_a_twentieth() -> None:
    assert (Z_GRID.low, Z_GRID.high, Z_GRID.step, Z_GRID.steps, Z_GRID.decimals) == (1.0, 5.0, 0.05, 80, 2)
    assert Z_GRID.stops[:3] == [1.0, 1.05, 1.1]
    assert all(level in Z_GRID.stops for level in (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5))


@pytest.mark.parametrize(
    ("low", "high", "step", "steps"),
    [(1, 4, 0.05, 60), (0, 1, 0.01, 100), (0, 100, 1, 100), (1, 10, 0.1, 90), (-2, 2, 0.05, 80), (0, 1000, 10, 100)],
)
def test_steps_are_round(low: float, high: float, step: float, steps: int) -> None:
    grid = Grid.over(low, high)
    assert (grid.low, grid.high, grid.step, grid.steps) == (low, high, step, steps)


@given(low=st.floats(-1e4, 1e4), extent=st.floats(1e-3, 1e4))
def test_a_grid_covers_its_range_with_few_stops(low: float, extent: float) -> None:
    grid = Grid.over(low, low + extent)
    assert grid.low <= low + 1e-5 * grid.step
    assert grid.high >= low + extent - 1e-5 * grid.step
    assert 1 <= grid.steps <= MOST_STOPS + 1
    assert len(set(grid.stops)) == grid.steps + 1
    assert grid.stops == sorted(grid.stops)


def test_one_level_makes_a_grid_too() -> None:
    assert Grid.over(3, 3).steps >= 1


@settings(max_examples=50)
@given(
    values=st.lists(
        st.one_of(
            st.floats(0.875, 5.125, width=32),
            st.sampled_from(Z_GRID.stops).map(np.float32),
            st.sampled_from(Z_GRID.stops).map(lambda stop: np.nextafter(np.float32(stop), np.float32(0))),
        ),
        min_size=1,
        max_size=50,
    )
)
def test_what_the_bins_keep_is_what_a_comparison_in_float32_keeps(values: list[float]) -> None:
    score_N = np.asarray(values, np.float32)
    counts = Z_GRID.count(score_N)
    assert sum(counts) == len(values)
    for i, stop in enumerate(Z_GRID.stops):
        assert sum(counts[i + 1 :]) == int((score_N >= np.float32(stop)).sum())


def test_statuses_are_counted_with_their_first_row(tmp_path: Path) -> None:
    rows = [
        row(0, status="bad_image", error="first"),
        row(1),
        row(2, status="bad_image", error="second"),
        row(3, status="missing_prompt", error="none"),
        row(4),
    ]
    found = read_statuses(open_scores(str(write_scores(tmp_path / "s.parquet", rows))))
    assert [(line.status, line.count, line.error) for line in found] == [
        ("ok", 2, ""),
        ("bad_image", 2, "first"),
        ("missing_prompt", 1, "none"),
    ]
    assert [line.example for line in found] == ["", "s-0000.tar, sample 0", "s-0000.tar, sample 3"]


def test_ok_comes_first_however_rare(tmp_path: Path) -> None:
    rows = [row(n, status="bad_text") for n in range(3)] + [row(3)]
    found = read_statuses(open_scores(str(write_scores(tmp_path / "s.parquet", rows))))
    assert [line.status for line in found] == ["ok", "bad_text"]


def test_numbers_are_those_of_the_scored_rows(table: Scores, numbers: Numbers) -> None:
    expected = table.frame.with_row_index("n").filter(pl.col("status") == "ok").collect()
    assert numbers.row_N.tolist() == expected["n"].to_list()
    assert list(numbers.score) == list(NAMES)
    for name in NAMES:
        assert numbers.score[name].tolist() == expected[name].to_list()
    assert numbers.std["realism"].tolist() == expected["realism_std"].to_list()


def test_rows_without_a_number_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        row(0),
        row(1, means=[3, math.nan, 3, 3]),
        row(2),
        row(3, means=[3, 3, math.inf, 3]),
        row(4, status="bad_text"),
    ]
    scores = open_scores(str(write_scores(tmp_path / "s.parquet", rows)))
    numbers = read_numbers(scores, columns_of(scores))
    assert numbers.row_N.tolist() == [0, 2]
    assert count_unscored(scores, numbers) == 2


def test_pictures_are_counted_once(table: Scores) -> None:
    frame = table.frame.filter(pl.col("status") == "ok").collect()
    assert count_pictures(table, columns_of(table)) == frame["sha256"].n_unique() < frame.height


def test_pictures_without_a_digest_arent_counted_as_one(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.parquet", [row(0), row(1, sha256=None)])
    scores = open_scores(str(path))
    assert count_pictures(scores, columns_of(scores)) is None


def test_pictures_that_have_no_score_arent_counted(tmp_path: Path) -> None:
    rows = [row(0), row(1), row(2, means=math.nan), row(3, status="bad_image"), row(4, means=math.nan, sha256=None)]
    scores = open_scores(str(write_scores(tmp_path / "s.parquet", rows)))
    assert count_pictures(scores, columns_of(scores)) == 2


@pytest.mark.parametrize("huge", [3e38, 1e30, 1e19])
def test_a_huge_std_lies_in_the_highest_cell(huge: float) -> None:
    numbers = of_scores(a=[1.0, 3.0, 5.0])
    numbers.std["a"] = np.asarray([0.5, huge, math.inf], np.float32)
    (line,) = uncertainty(numbers, Z_GRID)
    assert sorted(line["cells"]) == [[0, 6, 1], [20, WIDTH_BINS - 1, 1]]


def test_float64_scores_are_compared_as_filter_compares_them(tmp_path: Path) -> None:
    bounds = (2.95, 3.0, 3.7)
    values = [3.0, math.nextafter(3.0, 0), 2.99999999999, 3.7, float(np.float32(3.7)), 2.95, float(np.float32(2.95))]
    path = write_scores(tmp_path / "s.parquet", [row(n) for n in range(len(values))])
    table, metadata = pq.read_table(path), metadata_in(path)
    place = table.schema.get_field_index("overall")
    rewrite(table.set_column(place, "overall", pa.array(values, pa.float64())), path, metadata)
    scores = open_scores(str(path))
    numbers = read_numbers(scores, columns_of(scores))
    assert numbers.score["overall"].tolist() == values
    assert numbers.score["alignment"].dtype == np.float32
    counts = Z_GRID.count(numbers.score["overall"])
    for bound in bounds:
        targets = FilterTargets(kept=str(tmp_path / "kept.parquet"))
        kept = filter_scores(scores, FilterOptions(minimum={"overall": bound}), targets, dry_run=True).kept
        assert sum(counts[Z_GRID.stops.index(bound) + 1 :]) == kept


def test_a_description_is_numpys(numbers: Numbers) -> None:
    for line in describe(numbers):
        values = numbers.score[line["name"]].astype(np.float64)
        assert line["mean"] == pytest.approx(values.mean())
        assert line["std"] == pytest.approx(values.std())
        assert line["quantiles"][2] == pytest.approx(np.median(values))
        assert (line["lowest"], line["highest"]) == (values.min(), values.max())


def test_threshold_bins_give_the_means_of_what_is_kept(numbers: Numbers) -> None:
    bins = threshold_bins(numbers, Z_GRID)
    for s, by in enumerate(NAMES):
        for at in (0, 20, 41, 55):
            kept = numbers.score[by] >= np.float32(Z_GRID.stops[at])
            count = sum(bins["counts"][s][at + 1 :])
            assert count == kept.sum() > 0
            for t, of in enumerate(NAMES):
                mean = sum(bins["sums"][s][t][at + 1 :]) / count
                assert mean == pytest.approx(numbers.score[of][kept].astype(np.float64).mean(), abs=5e-3)


def test_correlations_are_scipys(numbers: Numbers) -> None:
    names = NAMES[1:]
    found = correlations(numbers.score, names)
    assert found["names"] == list(names)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            left, right = numbers.score[a], numbers.score[b]
            assert found["spearman"][i][j] == pytest.approx(spearmanr(left, right).statistic, abs=1e-4)
            assert found["pearson"][i][j] == pytest.approx(
                pearsonr(left.astype(float), right.astype(float))[0], abs=1e-4
            )


def test_a_dimension_that_never_varies_has_no_correlation() -> None:
    numbers = of_scores(a=[1, 2, 3], b=[2, 2, 2], c=[3, 2, 1])
    found = correlations(numbers.score, ["a", "b", "c"])
    assert found["spearman"] == [[1.0, None, -1.0], [None, None, None], [-1.0, None, 1.0]]


def test_one_row_has_no_correlation() -> None:
    assert correlations(of_scores(a=[1], b=[2]).score, ["a", "b"])["pearson"] == [[None, None], [None, None]]


def test_every_row_is_in_one_cell_of_the_uncertainty_chart(numbers: Numbers) -> None:
    for line in uncertainty(numbers, Z_GRID):
        assert sum(cell[2] for cell in line["cells"]) == len(numbers)
        assert all(0 <= x < Z_GRID.steps // 2 and 0 <= y < WIDTH_BINS for x, y, _ in line["cells"])
        assert sum(band["count"] for band in line["bands"]) == len(numbers)


def test_cells_and_bands_lie_where_the_row_is() -> None:
    numbers = of_scores(a=[1.0, 3.04, 5.0, 3.9])
    numbers.std["a"] = np.asarray([0, 1.0, 0.0, math.nan], np.float32)
    (line,) = uncertainty(numbers, Z_GRID)
    # Columns of 0.1 from 1, rows of 0.08 from 0; the row without a std isn't drawn.
    assert sorted(line["cells"]) == [[0, 0, 1], [20, 12, 1], [39, 0, 1]]
    assert [(band["low"], band["high"], band["count"], band["median"]) for band in line["bands"]] == [
        (1, 2, 1, 0),
        (2, 3, 0, None),
        (3, 4, 1, 1),
        (4, 5, 1, 0),
    ]


def test_without_levels_the_grid_covers_the_scores() -> None:
    grid = grid_for((), of_scores(a=[0.2, 0.7], b=[0.5, 0.91]))
    assert (grid.low, grid.high, grid.step) == (0.2, 0.92, 0.01)


def test_the_table_of_thresholds_has_a_line_for_every_level(numbers: Numbers) -> None:
    levels = [1 + k / 2 for k in range(9)]
    lines = threshold_table(threshold_bins(numbers, Z_GRID), Z_GRID, levels, len(numbers))
    assert [line["threshold"] for line in lines] == [f"{level:.2f}" for level in levels]
    for line in lines:
        for name, (share, mean) in zip(NAMES, line["cells"], strict=True):
            kept = numbers.score[name][numbers.score[name] >= np.float32(line["threshold"])]
            assert share == len(kept) / len(numbers)
            assert mean == (pytest.approx(float(kept.astype(float).mean()), abs=5e-3) if len(kept) else None)


def test_without_levels_the_table_of_thresholds_stays_short(numbers: Numbers) -> None:
    assert 5 <= len(threshold_table(threshold_bins(numbers, Z_GRID), Z_GRID, [], len(numbers))) <= 14


def test_columns_are_those_that_are_there(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.parquet", [row(0, rubric=two())], two())
    assert columns_of(open_scores(str(path))) == Columns(
        ("overall", "left", "right"), ("left", "right"), ("left", "right"), ("left", "right")
    )
    full = open_scores(str(path))
    narrow = without(full, "overall", "left_std", "right_probs", "left_probs")
    assert columns_of(narrow) == Columns(("left", "right"), ("left", "right"), ("right",), ())
    for missing in (["overall", "left", "right"], ["status"], ["prompt"]):
        with pytest.raises(TableError, match="column"):
            columns_of(without(full, *missing))


def test_every_status_may_be_the_only_one(tmp_path: Path) -> None:
    for status in Status:
        scores = open_scores(str(write_scores(tmp_path / f"{status}.parquet", [row(0, status=status)])))
        assert [line.status for line in read_statuses(scores)] == [status]
