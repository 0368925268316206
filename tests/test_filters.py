"""`zscore filter` against a plain Python filter that looks at one row after the other."""

from __future__ import annotations

import math
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.scores_factory import (
    metadata_in,
    metadata_of,
    random_rows,
    read_rows,
    rewrite,
    row,
    spoil,
    two,
    write_parts,
    write_scores,
    z_reward,
    zscore,
)
from zscore.calibration import Calibration, Fit, Reference, apply_calibration, select_confident, write_calibration
from zscore.criteria import FilterOptions
from zscore.errors import TableError, UsageError
from zscore.expressions import parse_bounds, parse_probability
from zscore.filters import FilterTargets, decide, filter_scores
from zscore.tables import ROW, Scores, open_scores

# Few distinct values, so that ties are common; NaN now and then.
means = st.sampled_from([1.0, 2.5, 3.0, 3.7, 4.0, math.nan])
SHARDS = ("s-1.tar", "s-0.tar", "s-2.tar")


@st.composite
def tables(draw, largest: int = 16):
    made = []
    for number in range(draw(st.integers(0, largest))):
        weights = draw(st.lists(st.integers(0, 3), min_size=6, max_size=6))
        weights[0] += not any(weights[:3])
        weights[3] += not any(weights[3:])
        probs = np.array(weights, dtype=float).reshape(2, 3)
        made.append(
            row(
                number,
                probs=probs / probs.sum(axis=1, keepdims=True),
                rubric=two(),
                shard=draw(st.sampled_from(SHARDS)),
                index=draw(st.integers(0, 5)),
                sha256=f"{draw(st.integers(0, 8)):064x}",
                width=draw(st.sampled_from([64, 512, None])),
                status=draw(st.sampled_from(["ok"] * 6 + ["bad_image", "missing_prompt"])),
            )
        )
        if draw(st.integers(0, 9)) == 0 and made[-1].scores is not None:
            made[-1].scores.mean_D[draw(st.integers(0, 1))] = math.nan
    return made


# Numbers that are none, anywhere: (row, column, what stands there).
gaps = st.lists(
    st.tuples(
        st.integers(0, 15),
        st.sampled_from(["overall", *(name + part for name in ("left", "right") for part in ("", "_std", "_probs"))]),
        st.sampled_from([None, math.nan, math.inf, -math.inf]),
    ),
    max_size=6,
)


@st.composite
def criteria(draw):
    fraction = draw(st.sampled_from([None, 0.01, 0.3, 0.5, 1.0]))
    found = {
        "minimum": draw(
            st.dictionaries(st.sampled_from(["overall", "left", "right"]), st.sampled_from([1.5, 2.0]), max_size=2)
        ),
        "maximum": draw(
            st.dictionaries(st.sampled_from(["overall", "left", "right"]), st.sampled_from([2.5, 3.0]), max_size=2)
        ),
        "max_std": draw(
            st.dictionaries(st.sampled_from(["overall", "left", "right"]), st.sampled_from([0.5, 1.2, 9]), max_size=3)
        ),
        "prob": tuple(
            parse_probability(text)
            for text in draw(
                st.lists(
                    st.sampled_from(["left>=2:0.5", "right<4:1", "left>1:0.25", "left>1:0.8", "right>=4:0.0000005"]),
                    max_size=3,
                )
            )
        ),
        "where": draw(st.sampled_from([None, None, *WHERE])),
        "dedupe": draw(st.booleans()),
        "fraction": fraction,
        "score": draw(st.sampled_from(list(RANKED))) if fraction is not None else None,
    }
    return FilterOptions(**found)


RANKED = {
    "overall": lambda made: made["overall"],
    "left": lambda made: made["left"],
    "min(left, right)": lambda made: min(made["left"], made["right"]),
    "(left - 1)/(right - left)": lambda made: quotient(made["left"] - 1, made["right"] - made["left"]),
    "min(2, (left - 1)/(right - left))": lambda made: np.minimum(
        2, quotient(made["left"] - 1, made["right"] - made["left"])
    ),
    "1e39*left": lambda made: 1e39 * made["left"],
}
# The condition, and the columns of fractional numbers that it reads.
WHERE = {
    "width >= 512": (lambda made: made["width"] is not None and made["width"] >= 512, []),
    "key != 'k00003' AND overall > 1.2": (
        lambda made: made["key"] != "k00003" and made["overall"] is not None and made["overall"] > np.float32(1.2),
        ["overall"],
    ),
    "right >= 2": (lambda made: made["right"] is not None and made["right"] >= 2, ["right"]),
    "left IS NULL OR right < 3": (
        lambda made: made["left"] is None or (made["right"] is not None and made["right"] < 3),
        ["left", "right"],
    ),
    "overall IS NULL": (lambda made: made["overall"] is None, ["overall"]),
}
NAMES = ["left", "right"]
HOLDS = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b, ">": lambda a, b: a > b}


def quotient(a: float, b: float) -> float:
    """As floats divide: infinity or NaN by zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(a) / np.float64(b))


def is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def naive_share(made, wanted) -> float:
    """P(score on that side of the value); NaN where there is no distribution."""
    probs = made[f"{wanted.dimension}_probs"] or [math.nan] * 3
    levels = zip(probs, (1, 2, 4), strict=True)
    return math.fsum(p for p, value in levels if HOLDS[wanted.comparison](value, wanted.value))


def are_numbers(made, options: FilterOptions, stds) -> bool:
    """Whether everything is a number that a criterion reads; an SQL condition may ask for null."""
    read = [*options.minimum, *options.maximum, *(f"{name}_std" for name, _ in stds)]
    read += [wanted.dimension for wanted in options.prob]
    if options.fraction is not None:
        read += [name for name in ("overall", "left", "right") if name in options.score]
    in_sql = WHERE[options.where][1] if options.where is not None else []
    if not read and "overall" not in in_sql:
        read = ["overall"]
    if not all(is_number(made[name]) for name in read):
        return False
    if not all(made[name] is None or is_number(made[name]) for name in in_sql):
        return False
    return options.fraction is None or is_number(RANKED[options.score](made))


def naive_reason(made, options: FilterOptions) -> str | None:
    """Why one row is dropped when nothing but itself counts."""
    if made["status"] != "ok":
        return made["status"]
    stds = [(n, bound) for key, bound in options.max_std.items() for n in (NAMES if key == "overall" else [key])]
    if not are_numbers(made, options, stds):
        return "nonfinite_score"
    checks = [(f"min:{name}", made[name] >= np.float32(bound)) for name, bound in options.minimum.items()]
    checks += [(f"max:{name}", made[name] <= np.float32(bound)) for name, bound in options.maximum.items()]
    for wanted in options.prob:
        share = naive_share(made, wanted)
        # Thirds in float32 don't sum to 1; but 0 isn't nearly anything.
        enough = share >= wanted.minimum or math.isclose(share, wanted.minimum, rel_tol=5e-7)
        checks.append((f"prob:{wanted.dimension}", math.isfinite(share) and enough))
    checks += [(f"max_std:{name}", made[f"{name}_std"] <= np.float32(bound)) for name, bound in stds]
    checks.append(("where", options.where is None or WHERE[options.where][0](made)))
    return next((reason for reason, passed in checks if not passed), None)


def naive_reasons(rows, options: FilterOptions) -> list[str | None]:
    """None where a row is kept."""
    reasons = [naive_reason(made, options) for made in rows]
    if options.dedupe:
        seen = set()
        for number, made in enumerate(rows):
            if reasons[number] is None:
                if made["sha256"] in seen:
                    reasons[number] = "duplicate"
                seen.add(made["sha256"])
    if options.fraction is not None:
        left = [number for number, reason in enumerate(reasons) if reason is None]
        score = RANKED[options.score]
        left.sort(key=lambda number: (-score(rows[number]), rows[number]["shard"], rows[number]["index"], number))
        wanted = int((Decimal(str(options.fraction)) * len(left)).to_integral_value(ROUND_HALF_UP))
        for number in left[wanted:]:
            reasons[number] = "fraction"
    return reasons


def opened(path: Path) -> Scores:
    return open_scores(str(path))


def run(path: Path, options: FilterOptions, **targets):
    kept = path.parent / "kept.parquet"
    summary = filter_scores(opened(path), options, FilterTargets(kept=str(kept), **targets), dry_run=False)
    return summary, read_rows(kept)


def kept_keys(path: Path, **options) -> list[str]:
    return [made["key"] for made in run(path, FilterOptions(**options))[1]]


class TestAgainstPlainPython:
    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(tables(), gaps, criteria())
    def test_every_row_has_the_same_fate(self, tmp_path: Path, made, holes, options: FilterOptions) -> None:
        path = spoil(write_scores(tmp_path / "scores.parquet", made, two()), holes)
        rows = read_rows(path)
        expected = naive_reasons(rows, options)
        summary, kept = run(path, options, dropped=str(tmp_path / "dropped.parquet"))
        assert [one["key"] for one in kept] == [
            one["key"] for one, reason in zip(rows, expected, strict=True) if reason is None
        ]
        dropped = read_rows(tmp_path / "dropped.parquet")
        assert [(one["key"], one["reason"]) for one in dropped] == [
            (one["key"], reason) for one, reason in zip(rows, expected, strict=True) if reason is not None
        ]
        assert (summary.rows, summary.kept) == (len(rows), len(kept))
        assert summary.dropped == Counter(reason for reason in expected if reason is not None)

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(tables(), criteria())
    def test_many_files_say_what_one_says(self, tmp_path: Path, made, options: FilterOptions) -> None:
        # Parts are read in shard order, so the one file gets that order too.
        made = sorted(made, key=lambda one: one.shard)
        if not made:
            return
        folder = tmp_path / "parts"
        for old in folder.glob("*.parquet"):
            old.unlink()
        write_parts(folder, made, two())
        path = write_scores(tmp_path / "scores.parquet", made, two())
        one, parts = (decide(opened(source), options) for source in (path, folder))
        assert one.code_N.tolist() == parts.code_N.tolist()
        assert one.dropped == parts.dropped

    def test_both_ways_of_copying_keep_the_same_rows(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "scores.parquet", random_rows(rows=3000, groups=50), z_reward())
        quick = FilterOptions(minimum={"overall": 3.0}, prob=(parse_probability("alignment>=3:0.5"),))
        decision = decide(opened(path), quick)
        assert decision.predicate is not None
        slow = FilterOptions(minimum={"overall": 3.0}, prob=quick.prob, where="true")
        assert decide(opened(path), slow).predicate is None
        assert run(path, quick)[1] == run(path, slow)[1]


class TestBounds:
    def test_a_score_that_equals_the_bound_is_kept(self, tmp_path: Path) -> None:
        # As float32 4.1 is below the float64 4.1, and 3.7 above it.
        for bound in (3.7, 4.1):
            path = write_scores(tmp_path / "scores.parquet", [row(0, means=bound)])
            assert kept_keys(path, minimum={"alignment": bound}) == ["k00000"]
            assert kept_keys(path, maximum={"alignment": bound}) == ["k00000"]

    def test_a_share_of_one_can_be_asked_for(self, tmp_path: Path) -> None:
        thirds = np.full((4, 9), 1 / 9)
        path = write_scores(tmp_path / "scores.parquet", [row(0, probs=thirds)])
        assert kept_keys(path, prob=(parse_probability("alignment>=1:1"),)) == ["k00000"]
        assert kept_keys(path, prob=(parse_probability("alignment>1:1"),)) == []

    def test_a_tiny_share_is_a_share(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(0, means=3), row(1, means=5)])
        assert kept_keys(path, prob=(parse_probability("alignment>=5:0.0000005"),)) == ["k00001"]

    def test_both_bounds_of_a_std_hold(self, tmp_path: Path) -> None:
        wide = np.eye(9)[[4] * 4]
        wide[0] = 1 / 9  # in alignment alone
        path = write_scores(tmp_path / "s.parquet", [row(0, means=3), row(1, probs=wide)])
        for bounds in ({"overall": 0.8, "alignment": 9}, {"alignment": 9, "overall": 0.8}, {"alignment": 0.8}):
            assert kept_keys(path, max_std=bounds) == ["k00000"]

    def test_every_dropped_row_is_counted_where_two_criteria_share_a_reason(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(n, means=n) for n in (1, 2, 3, 4, 5)])
        both = tuple(parse_probability(text) for text in ("alignment>=2:0.5", "alignment>=4:0.5"))
        summary, kept = run(path, FilterOptions(prob=both))
        assert (summary.dropped, len(kept)) == ({"prob:alignment": 3}, 2)

    def test_lists_of_any_length_are_read_too(self, tmp_path: Path) -> None:
        table = pq.read_table(write_scores(tmp_path / "s.parquet", random_rows(rows=40)))
        place = table.schema.get_field_index("alignment_probs")
        loose = table.set_column(place, "alignment_probs", table["alignment_probs"].cast(pa.list_(pa.float32())))
        path = rewrite(loose, tmp_path / "loose.parquet")
        wanted = (parse_probability("alignment>=3:0.5"),)
        assert isinstance(opened(path).schema["alignment_probs"], pl.List)
        assert kept_keys(path, prob=wanted) == kept_keys(tmp_path / "s.parquet", prob=wanted) != []

    def test_a_missing_or_broken_distribution_has_no_share(self, tmp_path: Path) -> None:
        made = [row(0, means=5), row(1, means=5)]
        assert made[0].scores is not None
        made[0].scores.probs_DK[:] = math.nan
        path = write_scores(tmp_path / "s.parquet", made)
        assert kept_keys(path, prob=(parse_probability("alignment>=4:0.5"),)) == ["k00001"]

    def test_infinity_is_no_score(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(0, means=math.inf), row(1, means=5)])
        summary, kept = run(path, FilterOptions(minimum={"overall": 2}))
        assert summary.dropped == {"nonfinite_score": 1}
        assert len(kept) == 1

    def test_nan_in_a_score_that_nobody_reads_does_no_harm(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(0, means=[4, math.nan, 4, 4])])
        assert kept_keys(path, minimum={"alignment": 3}) == ["k00000"]
        assert kept_keys(path, minimum={"realism": 3}) == []
        assert kept_keys(path) == []  # overall is NaN as well

    def test_parsing(self) -> None:
        assert parse_bounds(["4.0", "realism=3.5"], "--min") == {"overall": 4.0, "realism": 3.5}
        assert parse_bounds(["overall = -1e0"], "--min") == {"overall": -1.0}
        wanted = parse_probability(" realism < 2.5 : 0.3 ")
        assert (wanted.dimension, wanted.comparison, wanted.value, wanted.minimum) == ("realism", "<", 2.5, 0.3)
        assert wanted.levels((1, 2, 2.5, 3)) == [0, 1]
        assert str(wanted) == "realism<2.5:0.3"

    @pytest.mark.parametrize(
        ("texts", "said"),
        [
            (["four"], "--min four: 'four' isn't a number"),
            (["realism="], "--min realism=: '' isn't a number"),
            (["nan"], "--min nan: nan isn't a finite number"),
            (["inf"], "isn't a finite number"),
            (["3", "overall=4"], "--min is given twice for overall: 3 and 4"),
        ],
    )
    def test_bounds_that_can_not_be_read(self, texts: list[str], said: str) -> None:
        with pytest.raises(UsageError, match=said):
            parse_bounds(texts, "--min")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("alignment>=4", "write DIMENSION>=VALUE:PROBABILITY, like alignment>=4:0.8"),
            ("alignment=4:0.8", "write DIMENSION>=VALUE"),
            ("alignment>=x:0.8", "'x' isn't a number"),
            ("alignment>=4:nan", "isn't a finite number"),
            ("alignment>=4:1.5", "the probability 1.5 must be above 0 and at most 1"),
            ("alignment>=4:0", "must be above 0"),
            ("overall>=4:0.8", "overall has no distribution of its own; name a dimension"),
        ],
    )
    def test_probabilities_that_can_not_be_read(self, text: str, said: str) -> None:
        with pytest.raises(UsageError, match=said):
            parse_probability(text)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"minimum": {"realsim": 3}}, "--min: there is no dimension 'realsim': did you mean 'realism'?"),
            ({"maximum": {"overal": 3}}, "--max: there is no dimension 'overal': did you mean 'overall'?"),
            ({"max_std": {"aesthetic": 3}}, "--max-std: there is no dimension 'aesthetic': did you mean 'aesthetics'?"),
            (
                {"prob": (parse_probability("algnment>4:1"),)},
                "--prob: there is no dimension 'algnment': did you mean 'al",
            ),
            ({"prob": (parse_probability("alignment>5:1"),)}, "no level is > 5; they go from 1 to 5"),
            ({"fraction": 0.0}, "--fraction 0: give a share above 0 and at most 1, like 0.3"),
            ({"fraction": 1.1}, "--fraction 1.1: give a share"),
            ({"fraction": math.nan}, "--fraction nan: give a share"),
            (
                {"fraction": 0.5, "score": "realsm"},
                "--score 'realsm': there is no dimension 'realsm': did you mean 'rea",
            ),
            ({"confidence": 0.9}, "--confidence needs --calibration"),
        ],
    )
    def test_options_that_can_not_hold(self, tmp_path: Path, options, said: str) -> None:
        scores = opened(write_scores(tmp_path / "s.parquet", [row()]))
        with pytest.raises(UsageError) as raised:
            decide(scores, FilterOptions(**options))
        assert said in str(raised.value)

    def test_a_column_that_was_left_out(self, tmp_path: Path) -> None:
        table = pq.read_table(write_scores(tmp_path / "s.parquet", [row()])).drop_columns(["alignment_probs", "sha256"])
        scores = opened(rewrite(table, tmp_path / "less.parquet"))
        for options in ({"prob": (parse_probability("alignment>4:1"),)}, {"dedupe": True}):
            with pytest.raises(TableError, match=r"less\.parquet has no column"):
                decide(scores, FilterOptions(**options))

    def test_levels_that_differ_have_no_common_probability(self, tmp_path: Path) -> None:
        metadata = metadata_of([], two())
        metadata["rubric"] |= {"hash": "another", "levels": [{"token": "1", "value": 1.0}]}
        one = write_scores(tmp_path / "one.parquet", [row(0, rubric=two())], two())
        other = rewrite(pq.read_table(one), tmp_path / "other.parquet", metadata)
        scores = open_scores(str(one), str(other), allow_mixed=True)
        with pytest.raises(TableError, match="different levels"):
            decide(scores, FilterOptions(prob=(parse_probability("left>=2:0.5"),)))
        assert decide(scores, FilterOptions(minimum={"left": 2})).kept == 2


class TestWhere:
    @pytest.fixture
    def scores(self, tmp_path: Path) -> Scores:
        made = [row(n, means=1 + n, width=None if n == 3 else 100 * n, error=None) for n in range(5)]
        return opened(write_scores(tmp_path / "s.parquet", made))

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            ("width >= 200", [2, 4]),
            ("width >= 200 OR width IS NULL", [2, 3, 4]),
            ("key LIKE 'k0000%' AND index IN (0, 4)", [0, 4]),
            ("overall > AVG(overall)", [3, 4]),
            ("shard = 's-0000.tar' AND status = 'ok'", [0, 1, 2, 3, 4]),
            ("NULL > 1", []),
        ],
    )
    def test_sql(self, scores: Scores, text: str, kept: list[int]) -> None:
        code_N = decide(scores, FilterOptions(where=text)).code_N
        assert np.flatnonzero(code_N == 0).tolist() == kept

    @pytest.mark.parametrize(
        ("text", "kept", "broken"),
        [
            ("realism >= 4.9", [4], [1, 3]),  # polars takes NaN for larger than every number
            ("alignment = 1 OR realism <> 3", [4], [1, 3]),
            ("realism IS NULL", [2], [1, 3]),
            ("width >= 64", [0, 1, 2, 3, 4], []),
        ],
    )
    def test_nan_meets_no_condition_but_null_can_be_asked_for(self, tmp_path: Path, text: str, kept, broken) -> None:
        path = write_scores(tmp_path / "n.parquet", [row(0), row(1), row(2), row(3), row(4, means=5)])
        holes = [(1, "realism", math.nan), (2, "realism", None), (3, "realism", math.inf)]
        decision = decide(opened(spoil(path, holes)), FilterOptions(minimum={"alignment": 1}, where=text))
        assert np.flatnonzero(decision.code_N == 0).tolist() == kept
        assert decision.dropped.get("nonfinite_score", 0) == len(broken)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("widht > 3", "there is no column 'widht': did you mean 'width'?"),
            ("width >", "--where 'width >': "),
            ("width + 1", "is a Int32, not a condition"),
            ("key > 3", "--where 'key > 3': "),
            ("", "--where '': "),
        ],
    )
    def test_what_is_no_condition(self, scores: Scores, text: str, said: str) -> None:
        with pytest.raises(UsageError) as raised:
            decide(scores, FilterOptions(where=text))
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("text", ["CAST(prompt AS INT) > 3", "width > 3 AND CAST(key AS DOUBLE) > 3"])
    def test_what_fails_only_at_some_row(self, scores: Scores, text: str) -> None:
        with pytest.raises(UsageError) as raised:
            decide(scores, FilterOptions(where=text))
        assert str(raised.value).startswith(f"--where '{text}': conversion from `str` to ")
        assert "\n" not in str(raised.value)

    def test_a_broken_file_is_the_files_fault(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(n, group=str(n)) for n in range(50)])
        place = pq.read_metadata(path).row_group(0)
        column = next(c for c in map(place.column, range(place.num_columns)) if c.path_in_schema == "prompt")
        data, start = bytearray(path.read_bytes()), column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
        path.write_bytes(data)
        with pytest.raises(TableError, match=r"can't read .*s\.parquet"):
            decide(opened(path), FilterOptions(where="prompt LIKE '%a%'"))


class TestFraction:
    @pytest.mark.parametrize(
        ("rows", "fraction", "kept"), [(10, 0.3, 3), (10, 0.25, 3), (7, 0.5, 4), (1, 0.3, 0), (29, 0.1, 3)]
    )
    def test_the_count_is_exact_whatever_the_ties(self, tmp_path: Path, rows: int, fraction: float, kept: int) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(n, means=3) for n in range(rows)])
        assert len(kept_keys(path, fraction=fraction)) == kept

    def test_ties_go_by_shard_and_index_not_by_row(self, tmp_path: Path) -> None:
        places = [("b", 1), ("a", 7), ("b", 0), ("a", 3)]
        path = write_scores(
            tmp_path / "s.parquet", [row(n, shard=s, index=i, key=f"{s}{i}") for n, (s, i) in enumerate(places)]
        )
        assert kept_keys(path, fraction=0.25) == ["a3"]
        assert kept_keys(path, fraction=0.5) == ["a7", "a3"]
        assert kept_keys(path, fraction=0.75) == ["a7", "b0", "a3"]

    @pytest.mark.parametrize(
        ("score", "kept", "broken"),
        [
            ("(overall - 3)/(alignment - realism)", [], 10),  # 0/0 in every row
            ("min(5, (overall - 3)/(alignment - realism))", [], 10),
            ("1e39*alignment", ["k00007", "k00008", "k00009"], 0),  # beyond float32
            ("1e-50*alignment", ["k00007", "k00008", "k00009"], 0),
            ("1/(alignment - 1.5)", ["k00003", "k00004", "k00005"], 1),
        ],
    )
    def test_a_score_that_is_no_number_takes_no_part(self, tmp_path: Path, score: str, kept, broken: int) -> None:
        made = [row(n, means=3 if "overall" in score else 1 + n / 4) for n in range(10)]
        path = write_scores(tmp_path / "s.parquet", made)
        summary, found = run(path, FilterOptions(fraction=0.3, score=score))
        assert [one["key"] for one in found] == kept
        assert summary.dropped.get("nonfinite_score", 0) == broken

    def test_it_is_a_share_of_what_passes_everything_else(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(n, means=1 + n % 4) for n in range(20)])
        assert len(kept_keys(path, minimum={"overall": 3}, fraction=0.5)) == 5


class TestDedupe:
    def test_the_first_that_passes_is_kept(self, tmp_path: Path) -> None:
        same = {"sha256": "ab" * 32}
        made = [row(0, means=2, **same), row(1, means=4, **same), row(2, means=5, **same), row(3, means=5)]
        path = write_scores(tmp_path / "s.parquet", made)
        assert kept_keys(path, minimum={"overall": 3}, dedupe=True) == ["k00001", "k00003"]
        assert kept_keys(path, dedupe=True) == ["k00000", "k00003"]

    def test_equal_hashes_are_compared_in_full(self, tmp_path: Path) -> None:
        from zscore.filters import _duplicates

        made = [row(n, sha256=f"{n % 3:064x}") for n in range(7)]
        scores = opened(write_scores(tmp_path / "s.parquet", made))
        collided = pl.Series([0, 0, 2, 0, 0, 2, 0], dtype=pl.UInt64)  # two pictures, one hash
        passing = np.array([True, True, False, True, True, True, True])
        assert np.flatnonzero(_duplicates(scores, collided, passing)).tolist() == [3, 4, 6]

    def test_rows_without_a_hash_are_nobodys_copies(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(n, sha256=None) for n in range(3)])
        assert len(kept_keys(path, dedupe=True)) == 3


def datacomp_keeps(subset: np.ndarray, uid: str) -> bool:
    """How DataComp's tools look a sample up in a subset file."""
    wanted = np.array([divmod(int(uid, 16), 2**64)], np.dtype("u8,u8"))[0]
    return bool(np.searchsorted(subset, wanted, "right") - np.searchsorted(subset, wanted, "left") == 1)


class TestUids:
    def test_datacomp_finds_what_is_kept_and_nothing_else(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", random_rows(rows=300))
        _, kept = run(path, FilterOptions(minimum={"overall": 3}), npy=str(tmp_path / "kept.npy"))
        subset = np.load(tmp_path / "kept.npy", mmap_mode="r", allow_pickle=False)
        assert subset.dtype == np.dtype("u8,u8")
        assert [tuple(pair) for pair in subset] == sorted({tuple(pair) for pair in subset.tolist()})
        kept_pictures = {made["sha256"] for made in kept}
        assert 0 < len(subset) == len(kept_pictures) < len(kept)
        for made in read_rows(path):
            assert datacomp_keeps(subset, made["sha256"][:32]) == (made["sha256"] in kept_pictures)

    def test_a_uid_column_wins(self, tmp_path: Path) -> None:
        uids = ["f" * 32, "0" * 31 + "1"]
        path = write_scores(tmp_path / "s.parquet", [row(0), row(1)], extra={"uid": uids})
        run(path, FilterOptions(), npy=str(tmp_path / "kept.npy"))
        assert np.load(tmp_path / "kept.npy").tolist() == [(0, 1), (2**64 - 1, 2**64 - 1)]

    @pytest.mark.parametrize("uid", ["xyz", "g" * 32, "0" * 31, "0" * 33, None])
    def test_what_is_no_uid(self, tmp_path: Path, uid) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(0), row(1)], extra={"uid": ["0" * 32, uid]})
        with pytest.raises(TableError, match="--npy: 1 kept rows haven't 32 hexadecimal digits in 'uid'"):
            run(path, FilterOptions(), npy=str(tmp_path / "kept.npy"))
        assert sorted(one.name for one in tmp_path.iterdir()) == ["s.parquet"]

    def test_nothing_kept_is_an_empty_array(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row()])
        run(path, FilterOptions(minimum={"overall": 5}), npy=str(tmp_path / "kept.npy"))
        assert np.load(tmp_path / "kept.npy").shape == (0,)


MADE_FOR = metadata_of([], two())


def scored_frame(score_ND: np.ndarray) -> pl.DataFrame:
    """A table of the rubric `two` with these means; no more columns than bounds on means need."""
    frame = pl.DataFrame(score_ND, schema=list(two().names)).with_row_index("index")
    return frame.with_columns(
        shard=pl.lit("s"), status=pl.lit("ok"), overall=pl.mean_horizontal(two().names).cast(pl.Float32)
    )


def in_memory(frame: pl.DataFrame) -> Scores:
    """As if it had been opened from a file."""
    numbered = frame.lazy().with_row_index(ROW)
    return Scores(frame.lazy(), frame.schema, metadata_of([], two()), ("s.parquet",), frame.height, numbered)


class TestCalibrated:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        means = np.random.default_rng(3).uniform(1.5, 4.5, (200, 4))
        return write_scores(tmp_path / "s.parquet", [row(n, means=means[n]) for n in range(200)])

    @pytest.fixture
    def calibration(self) -> Calibration:
        random = np.random.default_rng(0)
        score = np.sort(random.uniform(2, 4, 60))
        human = np.clip(score + random.normal(0, 0.1, 60), 1, 5)
        return Calibration(
            values=z_reward().values,
            dimensions=z_reward().names,
            fits={"alignment": Fit(temperature=0.5, shift=0.8)},
            references={"overall": Reference(tuple(score.tolist()), tuple(human.tolist()))},
            provenance=metadata_of([]),
        )

    def test_calibrated_scores_decide_and_the_old_ones_are_written(self, path: Path, calibration: Calibration) -> None:
        frame = apply_calibration(pl.read_parquet(path), calibration)
        ok = frame["status"].cast(pl.String) == "ok"
        expected = frame.filter(ok & (frame["alignment"] >= np.float32(3.4)))["key"].to_list()
        options = FilterOptions(minimum={"alignment": 3.4}, calibration=calibration)
        summary, kept = run(path, options)
        assert [made["key"] for made in kept] == expected
        before = {made["key"]: made for made in read_rows(path)}
        assert all(made == before[made["key"]] for made in kept)
        assert expected != kept_keys(path, minimum={"alignment": 3.4})
        assert summary.kept == len(expected)

    def test_confidence_raises_the_bound(self, path: Path, calibration: Calibration) -> None:
        frame = apply_calibration(pl.read_parquet(path), calibration).filter(pl.col("status") == "ok")
        mask = select_confident(frame["overall"], calibration, 3.1, 0.8)
        options = FilterOptions(minimum={"overall": 3.1}, calibration=calibration, confidence=0.8)
        summary, kept = run(path, options)
        assert [made["key"] for made in kept] == frame.filter(mask)["key"].to_list() != []
        assert summary.dropped["confidence:overall"] == (~mask).sum()
        with pytest.raises(UsageError, match="--confidence needs --min"):
            decide(opened(path), FilterOptions(calibration=calibration, confidence=0.8))

    @pytest.mark.parametrize(
        ("beside", "said"),
        [
            ({"minimum": {"alignment": 3, "overall": 3}}, "for one --min, not for alignment and overall together"),
            ({"maximum": {"overall": 5}}, "--max"),
            ({"maximum": {"overall": 0.0}}, "--max"),
            ({"prob": (parse_probability("realism>=3:0.5"),)}, "--prob"),
            ({"max_std": {"overall": 2.0}}, "--max-std"),
            ({"where": "width >= 64"}, "--where"),
            ({"where": ""}, "--where"),
            ({"dedupe": True}, "--dedupe"),
            ({"fraction": 0.5}, "--fraction"),
            ({"fraction": 0.0}, "--fraction"),
        ],
    )
    def test_confidence_stands_alone(self, path: Path, calibration: Calibration, beside, said: str) -> None:
        options = {"minimum": {"overall": 3}, "calibration": calibration, "confidence": 0.8} | beside
        with pytest.raises(UsageError) as raised:
            decide(opened(path), FilterOptions(**options))
        assert said in str(raised.value)
        assert "--confidence 0.8 holds for" in str(raised.value)

    @pytest.mark.parametrize(("column", "noise"), [("overall", 0.6), ("left", 1.0)])
    def test_the_promise_holds_over_many_draws(self, column: str, noise: float) -> None:
        """Of what `filter` keeps at --confidence 0.9, over 600 draws of ratings and scores, 10 % are bad on average."""
        random, false_shares, kept_shares = np.random.default_rng(5), [], []
        for _ in range(600):
            truth = np.clip(np.round(random.normal(3.0, 0.8, (350, 2)) * 2) / 2, 1, 4)
            score = (truth + random.normal(0, noise, truth.shape)).astype(np.float32)
            human = {"left": truth[:, 0], "right": truth[:, 1], "overall": truth.mean(axis=1)}[column]
            frame = scored_frame(score)
            reference = Reference(tuple(frame[column][:150].cast(pl.Float64).round(9)), tuple(human[:150]))
            calibration = Calibration(two().values, two().names, {}, {column: reference}, MADE_FOR)
            options = FilterOptions(minimum={column: 3.0}, calibration=calibration, confidence=0.9)
            kept = decide(in_memory(frame[150:]), options).code_N == 0
            false_shares.append((human[150:][kept] < 3.0).mean() if kept.any() else 0.0)
            kept_shares.append(kept.mean())
        assert np.mean(false_shares) <= 0.1 + 2 * np.std(false_shares) / np.sqrt(600)
        assert np.mean(kept_shares) > 0.1  # not by keeping nothing

    @pytest.mark.parametrize(
        ("minimum", "confidence", "said"),
        [
            (2, 0.999, "the calibration has 60 ratings of overall, --confidence 0.999 needs at least 999"),
            (2, 0.98361, "the calibration has 60 ratings of overall, --confidence 0.98361 needs at least 61"),
            (4.9, 0.98, "2 of 200 pictures have overall above 3.994, the highest of those that people rated below 4.9"),
            (4.9, 0.98, "with 60 ratings --confidence 0.98 asks for 164 there"),
        ],
    )
    def test_why_a_confidence_keeps_nothing(
        self, path: Path, calibration: Calibration, minimum, confidence, said: str
    ) -> None:
        options = FilterOptions(minimum={"overall": minimum}, calibration=calibration, confidence=confidence)
        summary, kept = run(path, options)
        assert kept == []
        assert said in summary.hint
        assert "--min asks for" not in summary.hint

    def test_a_calibration_of_another_model_is_refused(self, tmp_path: Path, calibration: Calibration) -> None:
        path = write_scores(tmp_path / "o.parquet", [row()], model={"id": "other", "weights": "1"})
        with pytest.raises(TableError, match="calibrate anew"):
            decide(opened(path), FilterOptions(calibration=calibration))

    def test_from_the_command_line(self, path: Path, calibration: Calibration, tmp_path: Path, capsys) -> None:
        write_calibration(calibration, str(tmp_path / "c.json"))
        out = tmp_path / "kept.parquet"
        call = ["filter", path, "--calibration", tmp_path / "c.json", "--min", 3.1, "--confidence", 0.8, "--out", out]
        assert zscore(*call) == 0
        assert "confidence:overall" in capsys.readouterr().out
        step = metadata_in(out)["derived"][0]
        assert step["criteria"] == {"min": {"overall": 3.1}, "confidence": 0.8, "calibrated": True}
        again = ["filter", out, "--out", tmp_path / "again.parquet"]
        assert zscore(*again, "--calibration", tmp_path / "c.json", "--min", 3.2, "--confidence", 0.8) == 2
        assert "kept.parquet was kept with --confidence before" in capsys.readouterr().err
        assert zscore(*again, "--max", "realism=3", "--dedupe", "--fraction", 0.5) == 0
        parts = [write_scores(tmp_path / f"{n}/{n}.parquet", [row(n)]) for n in range(2)]
        metadata = [metadata_in(out) | {"derived": [step | {"counts": {"rows": n}}]} for n in range(2)]
        for part, its in zip(parts, metadata, strict=True):
            rewrite(pq.read_table(part), part, its)
        call[1:2] = parts
        assert zscore(*call) == 2
        assert "0.parquet and 1 more was kept with --confidence before" in capsys.readouterr().err


class TestCommand:
    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        write_scores(tmp_path / "scores.parquet", random_rows(rows=100))
        return tmp_path

    def test_it_works_as_it_stands(self, here: Path, capsys) -> None:
        assert zscore("filter", "--min", "3.2") == 0
        shown = capsys.readouterr().out
        kept = read_rows(here / "kept.parquet")
        assert {"100 rows", "kept", "dropped: min:overall", "dropped: bad_image", "wrote kept.parquet"} <= {
            part.strip() for line in shown.splitlines() for part in line.split("  ")
        }
        assert 0 < len(kept) < 94
        assert list(kept[0]) == list(read_rows(here / "scores.parquet")[0])

    def test_metadata_says_how_it_came_about(self, here: Path) -> None:
        assert (
            zscore(
                "filter", "--min", "realism=3", "--max-std", "1.2", "--prob", "alignment>=3:0.5", "--fraction", "0.5"
            )
            == 0
        )
        metadata = metadata_in(here / "kept.parquet")
        step = metadata.pop("derived")[0]
        assert metadata == metadata_in(here / "scores.parquet")
        assert step["command"] == "filter"
        assert step["criteria"] == {
            "min": {"realism": 3.0},
            "max_std": {"overall": 1.2},
            "prob": ["alignment>=3:0.5"],
            "fraction": 0.5,
            "score": "overall",
        }
        counts = step["counts"]
        assert counts["kept"] == len(read_rows(here / "kept.parquet"))
        assert counts["kept"] + sum(counts["dropped"].values()) == counts["rows"] == 100
        assert zscore("filter", "kept.parquet", "--dedupe", "--out", "again.parquet") == 0
        assert len(metadata_in(here / "again.parquet")["derived"]) == 2

    def test_columns(self, here: Path) -> None:
        assert zscore("filter", "--columns", "overall, key", "--quiet") == 0
        assert list(read_rows(here / "kept.parquet")[0]) == ["overall", "key"]

    def test_a_dry_run_writes_nothing(self, here: Path, capsys) -> None:
        call = ["filter", "--min", 3, "--dry-run", "--dropped", "d.parquet", "--npy", "u.npy"]
        assert zscore(*call) == 0
        assert "dry run: nothing is written" in capsys.readouterr().out
        assert [path.name for path in here.iterdir()] == ["scores.parquet"]

    def test_quiet_says_nothing(self, here: Path, capsys) -> None:
        assert zscore("filter", "--min", 3, "-q") == 0
        assert capsys.readouterr() == ("", "")

    def test_nothing_kept_is_no_error_and_says_what_there_is(self, here: Path, capsys) -> None:
        assert zscore("filter", "--min", "6", "--max", "realism=0.5") == 0
        best = max(made["overall"] for made in read_rows(here / "scores.parquet") if made["overall"] is not None)
        shown = capsys.readouterr().out
        assert f"nothing is kept: the highest overall is {best:.4g}, --min asks for 6; the lowest realism is" in shown
        assert read_rows(here / "kept.parquet") == []
        assert zscore("filter", "kept.parquet", "--out", "again.parquet") == 0
        assert "kept.parquet has no rows" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--min", 1, "--where", "FALSE"], "nothing is kept\n"),
            (["--min", 1, "--max", "realism=0.5"], "nothing is kept: the lowest realism is"),
            (["--min", "realism=1", "--max", "realism=5", "--where", "key = ''"], "nothing is kept\n"),
        ],
    )
    def test_a_bound_that_is_reached_is_not_to_blame(self, here: Path, capsys, arguments, said: str) -> None:
        assert zscore("filter", *arguments) == 0
        assert said in capsys.readouterr().out

    @pytest.mark.parametrize("value", [3.7, 4.1])
    def test_the_best_that_equals_the_bound_is_not_to_blame(self, here: Path, capsys, value: float) -> None:
        write_scores(here / "one.parquet", [row(0, means=value), row(1, means=math.inf)])
        assert zscore("filter", "one.parquet", "--min", value, "--max", value, "--where", "FALSE") == 0
        assert "nothing is kept\n" in capsys.readouterr().out
        assert zscore("filter", "one.parquet", "--min", 4.5) == 0
        assert f"nothing is kept: the highest overall is {value}, --min asks for 4.5\n" in capsys.readouterr().out

    def test_all_rows_failed(self, here: Path, capsys) -> None:
        write_scores(here / "bad.parquet", [row(0, status="bad_image")])
        assert zscore("filter", "bad.parquet", "--min", 3) == 0
        assert "nothing is kept\n" in capsys.readouterr().out

    def test_an_existing_output_is_replaced_only_at_the_end(self, here: Path, capsys) -> None:
        assert zscore("filter", "--min", 3, "-q") == 0
        before = read_rows(here / "kept.parquet")
        assert zscore("filter", "--min", 3.3, "-q") == 0
        assert len(read_rows(here / "kept.parquet")) < len(before)
        after = (here / "kept.parquet").read_bytes()
        assert zscore("filter", "--npy", "u.npy", "--where", "key >") == 2
        assert (here / "kept.parquet").read_bytes() == after
        assert sorted(path.name for path in here.iterdir()) == ["kept.parquet", "scores.parquet"]

    def test_the_same_call_writes_the_same_bytes(self, here: Path) -> None:
        written = []
        for _ in range(3):
            assert zscore("filter", "--min", 2.9, "--dedupe", "--fraction", 0.5, "-q") == 0
            written.append((here / "kept.parquet").read_bytes())
        assert len(set(written)) == 1

    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (["nope.parquet"], 1, "zscore: there is no nope.parquet"),
            (["--out", "scores.parquet"], 2, "zscore: --out scores.parquet is the table that is read"),
            (["--dropped", "./kept.parquet"], 2, "--dropped and --out name the same file"),
            (["--columns", "key,overal"], 2, "--columns: there is no column 'overal': did you mean 'overall'?"),
            (["--columns", "key,overall, key"], 2, "zscore: --columns: 'key' is given twice"),
            (["--where", "CAST(prompt AS INT) > 3"], 2, "zscore: --where 'CAST(prompt AS INT) > 3': conversion"),
            (["--score", "algnmnt("], 2, "zscore: --score 'algnmnt(' is what --fraction ranks by: give --fraction too"),
            (["--score", "overall"], 2, "give --fraction too"),
            (["--min", "realsim=3"], 2, "did you mean 'realism'?"),
            (["--calibration", "nope.json"], 1, "nope.json"),
            (["--fraction", "much"], 2, "Invalid value for '--fraction'"),
        ],
    )
    def test_errors_are_one_line(self, here: Path, capsys, arguments: list[str], code: int, said: str) -> None:
        assert zscore("filter", *arguments) == code
        shown = capsys.readouterr().err
        assert said in shown
        assert "Traceback" not in shown
        if shown.startswith("zscore: "):
            assert shown.count("\n") == 1
        assert [path.name for path in here.iterdir()] == ["scores.parquet"]

    def test_files_of_two_models(self, here: Path, capsys) -> None:
        write_scores(here / "other.parquet", [row(0, means=5)], model={"id": "b", "weights": "b"})
        assert zscore("filter", "scores.parquet", "other.parquet") == 1
        assert "scores.parquet and other.parquet weren't scored alike: model 'made-up'" in capsys.readouterr().err
        assert zscore("filter", "scores.parquet", "other.parquet", "--allow-mixed", "--min", 4.9, "-q") == 0
        assert len(read_rows(here / "kept.parquet")) == 1

    def test_urls_on_both_sides(self, here: Path) -> None:
        memory = fsspec.filesystem("memory")
        memory.pipe("/in/scores.parquet", (here / "scores.parquet").read_bytes())
        out = "memory://filtered/kept.parquet"
        call = [
            "filter",
            "memory://in/scores.parquet",
            "--min",
            3,
            "--out",
            out,
            "--npy",
            "memory://filtered/u.npy",
            "-q",
        ]
        assert zscore(*call) == 0
        assert zscore("filter", "--min", 3, "-q") == 0
        (here / "remote.parquet").write_bytes(memory.cat("/filtered/kept.parquet"))
        assert read_rows(here / "remote.parquet") == read_rows(here / "kept.parquet")
        assert sorted(memory.ls("/filtered", detail=False)) == ["/filtered/kept.parquet", "/filtered/u.npy"]
        memory.store.clear()

    def test_help_has_examples(self, capsys) -> None:
        assert zscore("filter", "--help") == 0
        shown = capsys.readouterr().out
        assert "\n    zscore filter --min 4.0\n" in shown
        assert "replaced if it exists" in shown
