"""Best of N, statistics of groups, preference pairs and score expressions, against plain Python."""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.scores_factory import (
    metadata_in,
    random_rows,
    read_rows,
    rewrite,
    row,
    scores_of,
    spoil,
    two,
    write_parts,
    write_scores,
    z_reward,
    zscore,
)
from zscore import pairs as pairs_module
from zscore.errors import TableError, UsageError
from zscore.expressions import ScoreExpression, preference
from zscore.group_statistics import curve_points, group_statistics, weights
from zscore.pairs import PairOptions, choose_pairs
from zscore.ranking import rank
from zscore.selection import SelectOptions, SelectTargets, candidates, select
from zscore.tables import open_scores

VALUES = (1.0, 2.0, 4.0)
FUNCTIONS = {"min": min, "max": max}


@st.composite
def tables(draw, largest: int = 20):
    """Rows of a few groups over a few shards; few distinct scores, so that ties are common."""
    made = []
    for number in range(draw(st.integers(0, largest))):
        levels = draw(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()))
        probs = np.zeros((2, 3))
        probs[0, levels[0]] = probs[1, levels[1]] = 1
        if levels[2]:
            probs = (probs + 1 / 3) / 2
        made.append(
            row(
                number,
                probs=probs,
                rubric=two(),
                shard=f"s-{number // 5}.tar",
                group=draw(st.sampled_from("abcdef")),
                status=draw(st.sampled_from(["ok"] * 8 + ["bad_image"])),
            )
        )
        scores = made[-1].scores
        if scores is not None and draw(st.integers(0, 11)) == 0:
            scores.mean_D[0] = math.nan
    return made


# Numbers that are none, anywhere: (row, column, what stands there).
gaps = st.lists(
    st.tuples(
        st.integers(0, 19),
        st.sampled_from(["overall", *(name + part for name in ("left", "right") for part in ("", "_std", "_probs"))]),
        st.sampled_from([None, math.nan, math.inf, -math.inf]),
    ),
    max_size=8,
)


def leaves_of(text: str) -> list[str]:
    return ["left", "right"] if "overall" in text else [name for name in ("left", "right") if name in text]


def is_scored(made, text: str, risk: float) -> bool:
    """Whether everything that the score reads is a number."""
    read = [name for name in ("left", "right", "overall") if name in text]
    read += [f"{name}_std" for name in leaves_of(text)] if risk else []
    return all(made[name] is not None and math.isfinite(made[name]) for name in read)


def score_of(made, text: str, risk: float = 0.0) -> float:
    """A score by Python's own eval; with a risk, for expressions that grow with each dimension."""
    names = {"overall": made["overall"]} if "overall" in text else {name: made[name] for name in leaves_of(text)}
    if risk:
        names = {
            name: value - risk * statistics.fmean(made[f"{leaf}_std"] for leaf in leaves_of(name))
            for name, value in names.items()
        }
    return float(np.float32(eval(text, {**FUNCTIONS, **names})))


def naive_groups(rows, text: str = "overall", risk: float = 0.0):
    """Candidates by group in order of first appearance, best first: (score, row number)."""
    groups = defaultdict(list)
    for number, made in enumerate(rows):
        if made["status"] == "ok" and is_scored(made, text, risk) and math.isfinite(score_of(made, text, risk)):
            groups[made["group"]].append((score_of(made, text, risk), number))
    return {name: sorted(found, key=lambda one: (-one[0], one[1])) for name, found in groups.items()}


def run(path: Path, options: SelectOptions | None = None, **targets):
    options = options or SelectOptions()
    best = path.parent / "best.parquet"
    scores = open_scores(str(path))
    summary = select(scores, options, SelectTargets(best=str(best), **targets), dry_run=False)
    return summary, read_rows(best)


def ranked(path: Path, options: SelectOptions | None = None):
    options = options or SelectOptions()
    scores = open_scores(str(path))
    return candidates(scores, options, ScoreExpression(options.score, scores.dimensions)).ranking


class TestRanking:
    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 6), st.sampled_from([-2.0, -0.0, 0.0, 1.5, 3.0]), st.integers(1, 3))),
        st.integers(0, 3),
    )
    def test_against_plain_sorting(self, made, spread: int) -> None:
        # From all bits of the hash to only the lowest telling groups apart.
        factor = [0x9E3779B97F4A7C15, 1 << 60, 1, 1 << 3][spread]
        hashes = np.array([group * factor % 2**64 for group, _, _ in made], dtype=np.uint64)
        score_M = np.array([score for _, score, _ in made], dtype=np.float32)
        row_M = np.cumsum([gap for _, _, gap in made]).astype(np.uint32)
        found = rank(hashes, score_M, row_M)
        groups = defaultdict(list)
        for (group, score, _), number in zip(made, row_M.tolist(), strict=True):
            groups[group].append((-score, number))
        order = np.argsort(found.first_G)
        scores, numbers = found.scores(), found.rows()
        spans = [slice(found.start_G[g], found.start_G[g + 1]) for g in order]
        assert [list(zip((-scores[s]).tolist(), numbers[s].tolist(), strict=True)) for s in spans] == [
            sorted(one) for one in groups.values()
        ]
        assert found.first_G[order].tolist() == [min(number for _, number in one) for one in groups.values()]
        for place in range(4):
            expected = [sorted(one)[place][1] for one in groups.values() if len(one) > place]
            assert sorted(found.rows_at(place).tolist()) == sorted(expected)

    def test_large(self) -> None:
        random = np.random.default_rng(0)
        total = 200_000
        # 18 bits of the position push so much of the hash out that prefixes collide.
        hashes = random.integers(0, 2**64, 5000, dtype=np.uint64)[random.integers(0, 5000, total)]
        hashes[: total // 2] &= np.uint64(0xFFFF_8000_0000_FFFF)
        score_M = random.integers(0, 50, total).astype(np.float32)
        found = rank(hashes, score_M, np.arange(total, dtype=np.uint32))
        order = np.lexsort((np.arange(total), -score_M, hashes))
        expected = {int(hashes[g[0]]): g.tolist() for g in np.split(order, np.flatnonzero(np.diff(hashes[order])) + 1)}
        numbers = found.rows()
        for g in range(found.groups):
            members = numbers[found.start_G[g] : found.start_G[g + 1]].tolist()
            assert members == expected.pop(int(hashes[members[0]]))
        assert not expected


class TestBest:
    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        tables(),
        gaps,
        st.integers(1, 4),
        st.sampled_from(["overall", "left", "min(left, 2*right - 1)"]),
        st.sampled_from([0.0, 0.5]),
    )
    def test_against_plain_python(self, tmp_path: Path, made, holes, best: int, score: str, risk: float) -> None:
        path = spoil(write_scores(tmp_path / "s.parquet", made, two()), holes)
        rows = read_rows(path)
        groups = naive_groups(rows, score, risk)
        summary, found = run(
            path, SelectOptions(best=best, score=score, risk=risk), statistics=str(tmp_path / "g.parquet")
        )
        expected = {
            number: (rank_, score_) for one in groups.values() for rank_, (score_, number) in enumerate(one[:best], 1)
        }
        assert [one["key"] for one in found] == [rows[number]["key"] for number in sorted(expected)]
        for one, number in zip(found, sorted(expected), strict=True):
            assert (one.pop("select_rank"), one.pop("select_score")) == expected[number]
            assert repr(one) == repr(rows[number])  # NaN isn't equal to itself
        assert summary.selected == len(found)
        assert summary.rows == sum(map(len, groups.values())) + sum(summary.dropped.values())
        written = {one["group"]: one for one in read_rows(tmp_path / "g.parquet")}
        assert list(written) == list(groups)
        for name, one in groups.items():
            scores = [score_ for score_, _ in one]
            assert (written[name]["candidates"], written[name]["best"]) == (len(one), scores[0])
            assert written[name]["mean"] == pytest.approx(statistics.fmean(scores), abs=1e-6)
            assert written[name]["gain"] == pytest.approx(scores[0] - statistics.fmean(scores), abs=1e-6)

    def test_the_first_of_equals_wins(self, tmp_path: Path) -> None:
        made = [row(n, means=3, shard=f"s-{n}.tar", index=5 - n, group="g") for n in range(4)]
        assert [one["key"] for one in run(write_scores(tmp_path / "s.parquet", made))[1]] == ["k00000"]

    def test_groups_lie_across_files(self, tmp_path: Path) -> None:
        made = random_rows(rows=90, groups=12)
        folder = write_parts(tmp_path / "parts", made)
        one = run(write_scores(tmp_path / "s.parquet", made), SelectOptions(best=2))
        parts = run(folder, SelectOptions(best=2))
        assert parts == one

    def test_small_groups_are_kept_whole(self, tmp_path: Path) -> None:
        made = [row(0, group="one"), row(1, group="two"), row(2, group="two")]
        summary, found = run(write_scores(tmp_path / "s.parquet", made), SelectOptions(best=5))
        assert [(one["group"], one["select_rank"]) for one in found] == [("one", 1), ("two", 1), ("two", 2)]
        assert (summary.statistics.smallest, summary.statistics.median, summary.statistics.largest) == (1, 1.5, 2)

    def test_rows_that_take_no_part_are_counted(self, tmp_path: Path) -> None:
        made = [row(0), row(1, status="bad_image"), row(2, means=math.nan), row(3), row(4, status="truncated_shard")]
        path = write_scores(tmp_path / "s.parquet", made, extra={"seed": [1, 1, 1, None, None]})
        summary, found = run(path, SelectOptions(by="seed"))
        assert [one["key"] for one in found] == ["k00000"]
        assert summary.dropped == {"bad_image": 1, "no_group": 1, "nonfinite_score": 1, "truncated_shard": 1}

    @pytest.mark.parametrize("by", ["prompt", "shard", "width", "sha256"])
    def test_any_column_makes_groups(self, tmp_path: Path, by: str) -> None:
        path = write_scores(tmp_path / "s.parquet", random_rows(rows=60, groups=6))
        summary, found = run(path, SelectOptions(by=by))
        ok = [made for made in read_rows(path) if made["status"] == "ok"]
        assert summary.statistics.groups == len({made[by] for made in ok}) == len(found)
        best = {made[by]: max(one["overall"] for one in ok if one[by] == made[by]) for made in ok}
        assert all(one["overall"] == best[one[by]] for one in found)

    def test_risk_prefers_the_sure_thing(self, tmp_path: Path) -> None:
        sure, gamble = np.zeros((4, 9)), np.zeros((4, 9))
        sure[:, 4] = 1
        gamble[:, 0], gamble[:, 8] = 0.45, 0.55
        path = write_scores(tmp_path / "s.parquet", [row(0, probs=gamble), row(1, probs=sure)])
        assert [one["key"] for one in run(path)[1]] == ["k00000"]
        _, found = run(path, SelectOptions(risk=1.0))
        assert [(one["key"], one["select_score"]) for one in found] == [("k00001", 3.0)]

    def test_a_selection_can_be_selected_from_again(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", random_rows(rows=60, groups=6))
        run(path, SelectOptions(best=3))
        (tmp_path / "best.parquet").rename(tmp_path / "three.parquet")
        _, again = run(tmp_path / "three.parquet")
        _, once = run(path)
        assert again == once
        assert [step["command"] for step in metadata_in(tmp_path / "best.parquet").get("derived", [])] == ["select"]

    def test_real_candidates(self, tmp_path: Path, shared_data: Path) -> None:
        """Five generators' pictures of 27 prompts, a generator a shard; people's means stand in for a model's."""
        ratings = defaultdict(lambda: defaultdict(list))
        with (shared_data / "avt-ratings.csv").open() as lines:
            for one in csv.DictReader(lines):
                ratings[one["shard"], one["key"], one["prompt_id"]][one["dimension"]].append(float(one["score"]))
        made = []
        for number, ((shard, key, prompt), found) in enumerate(sorted(ratings.items())):
            means = [statistics.fmean(found[name]) for name in ("alignment", "realism", "aesthetics")]
            made.append(row(number, shard=shard, key=key, group=prompt, means=[*means, statistics.fmean(means)]))
        path = write_scores(tmp_path / "s.parquet", made)
        rows = read_rows(path)
        for score in ("overall", "alignment"):
            summary, found = run(path, SelectOptions(score=score))
            groups = defaultdict(list)
            for one in rows:
                groups[one["group"]].append(one[score])
            assert summary.statistics.groups == len(found) == 27
            assert {one["group"]: one[score] for one in found} == {name: max(one) for name, one in groups.items()}
            full = [one for one in groups.values() if len(one) == 5]
            last = summary.statistics.curve[4]
            assert (last.n, last.groups) == (5, len(full))
            assert last.best == pytest.approx(statistics.fmean(map(max, full)))
            assert last.random == pytest.approx(statistics.fmean(statistics.fmean(one) for one in full))


class TestStatistics:
    @given(st.integers(1, 7))
    def test_weights_are_those_of_all_draws(self, size: int) -> None:
        points = curve_points(size)
        found = weights(size, points)
        for place, n in enumerate(points.tolist()):
            draws = list(itertools.combinations(range(size), n))
            for j in range(size):
                assert found[j, place] == pytest.approx(sum(min(draw) == j for draw in draws) / len(draws))

    def test_weights_of_a_large_group(self) -> None:
        points = curve_points(5000)
        found = weights(5000, points)
        assert found.sum(axis=0) == pytest.approx(np.ones(len(points)))
        for place, n in enumerate(points.tolist()):
            assert found[3, place] == pytest.approx(math.comb(4996, n - 1) / math.comb(5000, n))

    def test_points(self) -> None:
        assert curve_points(0).tolist() == []
        assert curve_points(5).tolist() == [1, 2, 3, 4, 5]
        assert curve_points(33).tolist() == [*range(1, 33), 33]
        assert curve_points(200).tolist() == [*range(1, 33), 64, 128, 200]

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(tables())
    def test_the_curve_against_all_draws(self, tmp_path: Path, made) -> None:
        path = write_scores(tmp_path / "s.parquet", made, two())
        groups = [[score for score, _ in one] for one in naive_groups(read_rows(path)).values()]
        found = group_statistics(ranked(path))
        assert (found.groups, found.candidates) == (len(groups), sum(map(len, groups)))
        if not groups:
            assert math.isnan(found.gain)
            assert found.curve == ()
            return
        assert found.best == pytest.approx(statistics.fmean(map(max, groups)))
        assert found.random == pytest.approx(statistics.fmean(map(statistics.fmean, groups)))
        assert [point.n for point in found.curve] == list(range(1, max(map(len, groups)) + 1))
        for point in found.curve:
            enough = [one for one in groups if len(one) >= point.n]
            drawn = [statistics.fmean(map(max, itertools.combinations(one, point.n))) for one in enough]
            assert point.groups == len(enough)
            assert point.best == pytest.approx(statistics.fmean(drawn))
            assert point.random == pytest.approx(statistics.fmean(map(statistics.fmean, enough)))


def is_distribution(probs) -> bool:
    return probs is not None and all(p is not None and 0 <= p < math.inf for p in probs) and sum(probs) > 0


def naive_pairs(groups, min_gap: float, max_pairs: int | None):
    """(chosen row, rejected row), groups in order, widest gap first, then by rank."""
    found = []
    for one in groups.values():
        of_group = []
        for (i, (better, a)), (j, (worse, b)) in itertools.combinations(enumerate(one), 2):
            gap = better - worse
            if gap > 0 and gap >= min_gap - 1e-6:
                of_group.append((-gap, i, j, a, b))
        found += [(a, b) for *_, a, b in sorted(of_group)[:max_pairs]]
    return found


def naive_probability(chosen, rejected, text: str) -> float:
    """P(chosen better) + half of P(equal) by walking through every combination of levels."""

    def distribution(made):
        names = leaves_of(text)  # what isn't read may be no distribution
        for levels in itertools.product(*(zip(VALUES, made[f"{name}_probs"], strict=True) for name in names)):
            values = dict(zip(names, (value for value, _ in levels), strict=True))
            overall = {"overall": statistics.fmean(values.values())}
            yield eval(text, {**FUNCTIONS, **overall, **values}), math.prod(p for _, p in levels)

    total = 0.0
    for (x, p), (y, q) in itertools.product(distribution(chosen), distribution(rejected)):
        total += p * q * (0.5 if math.isclose(x, y, abs_tol=1e-9) else float(x > y))
    return total


class TestPairs:
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        tables(),
        gaps,
        st.sampled_from([0.0, 0.5, 1.5]),
        st.sampled_from([1, 2, 5, None]),
        st.sampled_from(["overall", "right", "0.7*left + 0.1*right", "max(left, 3 - right)"]),
    )
    def test_against_plain_python(self, tmp_path: Path, made, holes, min_gap: float, max_pairs, score: str) -> None:
        path = spoil(write_scores(tmp_path / "s.parquet", made, two()), holes)
        rows = read_rows(path)
        whole = [one for one in rows if all(is_distribution(one[f"{name}_probs"]) for name in leaves_of(score))]
        scored, paired = naive_groups(rows, score), naive_groups(whole, score)
        number = {id(one): n for n, one in enumerate(rows)}
        paired = {name: [(s, number[id(whole[n])]) for s, n in one] for name, one in paired.items()}
        expected = naive_pairs(paired, min_gap, max_pairs)
        options = SelectOptions(score=score, pairs=PairOptions(min_gap=min_gap, max_pairs=max_pairs))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pairs_module, "PAIRS_AT_ONCE", 3)
            summary, _ = run(path, options, pairs=str(tmp_path / "p.parquet"))
        found = read_rows(tmp_path / "p.parquet")
        assert summary.pairs == len(expected)
        assert summary.unpaired == sum(map(len, scored.values())) - sum(map(len, paired.values()))
        assert [(one["chosen_key"], one["rejected_key"]) for one in found] == [
            (rows[a]["key"], rows[b]["key"]) for a, b in expected
        ]
        for one, (a, b) in zip(found, expected, strict=True):
            assert one["probability"] == pytest.approx(naive_probability(rows[a], rows[b], score), abs=1e-5)
            for side, number in (("chosen", a), ("rejected", b)):
                made_ = rows[number]
                assert one[side] == f"{made_['shard']}/{made_['key']}"
                assert [one[f"{side}_{name}"] for name in ("shard", "index", "key", "sha256")] == [
                    made_[name] for name in ("shard", "index", "key", "sha256")
                ]
                assert one[f"{side}_score"] == score_of(made_, score)
            assert (one["prompt"], one["group"]) == (rows[a]["prompt"], rows[a]["group"])
            assert one["gap"] == pytest.approx(one["chosen_score"] - one["rejected_score"])

    def test_the_columns_that_trl_reads(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", random_rows(rows=60, groups=6))
        run(path, SelectOptions(pairs=PairOptions()), pairs=str(tmp_path / "p.parquet"))
        frame = pl.read_parquet(tmp_path / "p.parquet")
        assert frame.columns[:3] == ["prompt", "chosen", "rejected"]
        assert frame.schema.dtypes()[:3] == [pl.String] * 3
        assert "images" not in frame.columns
        assert frame.null_count().sum_horizontal().item() == 0
        assert metadata_in(tmp_path / "p.parquet")["derived"][0]["criteria"]["max_pairs"] == 1

    def test_a_gap_on_paper_is_a_gap(self, tmp_path: Path) -> None:
        # 4.1 - 3.6 is 0.49999976 in float32.
        path = write_scores(tmp_path / "s.parquet", [row(0, means=4.1), row(1, means=3.6)])
        assert len(choose_pairs(ranked(path), PairOptions(min_gap=0.5))) == 1
        assert len(choose_pairs(ranked(path), PairOptions(min_gap=0.51))) == 0

    def test_the_widest_pair_is_the_first_of_all(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", random_rows(rows=300, groups=20))
        one, all_ = (choose_pairs(ranked(path), PairOptions(max_pairs=most)) for most in (1, None))
        firsts = {}
        group = [made["group"] for made in read_rows(path)]
        for chosen, rejected in zip(all_.chosen_P.tolist(), all_.rejected_P.tolist(), strict=True):
            firsts.setdefault(group[chosen], (chosen, rejected))
        assert list(zip(one.chosen_P.tolist(), one.rejected_P.tolist(), strict=True)) == list(firsts.values())

    def test_a_group_too_large_for_all_its_pairs(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(n, means=1 + n % 5) for n in range(12)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pairs_module, "MAX_CANDIDATES", 10)
            assert len(choose_pairs(ranked(path), PairOptions())) == 1
            with pytest.raises(
                UsageError, match="12 candidates.*at most 10: pass --max-pairs 1, or group by something"
            ):
                choose_pairs(ranked(path), PairOptions(max_pairs=2))

    @pytest.mark.parametrize(
        ("options", "score", "said"),
        [
            ({"min_gap": -1.0}, "overall", "--min-gap -1: give 0 or more"),
            ({"max_pairs": 0}, "overall", "--max-pairs 0: give 1 or more"),
            ({}, "min(alignment, overall)", "reads 'alignment' twice"),
            ({}, "alignment - alignment", "reads 'alignment' twice"),
        ],
    )
    def test_what_can_not_be_paired(self, tmp_path: Path, options, score: str, said: str) -> None:
        path = write_scores(tmp_path / "s.parquet", [row()])
        with pytest.raises(UsageError, match=said.replace("(", r"\(")):
            run(path, SelectOptions(score=score, pairs=PairOptions(**options)), pairs=str(tmp_path / "p.parquet"))

    @pytest.mark.parametrize(
        "broken",
        [
            None,
            [],
            [math.nan] * 9,
            [0.5, math.nan, *[0.0] * 7],
            [0.5, None, *[0.0] * 7],
            [0.0] * 9,
            [math.inf, *[0.0] * 8],
            [-0.5, 1.5, *[0.0] * 7],
            [0.5, 0.5],
            [0.1] * 10,
        ],
    )
    def test_rows_without_a_distribution_are_in_no_pair(self, tmp_path: Path, capsys, broken) -> None:
        path = write_scores(tmp_path / "s.parquet", [row(n, means=n) for n in (1, 2, 3, 4)])
        table = pq.read_table(path)
        probs = table["realism_probs"].to_pylist()
        probs[0] = probs[3] = broken
        place = table.schema.get_field_index("realism_probs")
        made = table.set_column(place, "realism_probs", pa.array(probs, type=pa.list_(pa.float32())))
        rewrite(made, path, metadata_in(path))
        pairs = tmp_path / "p.parquet"
        assert zscore("select", path, "--pairs", pairs, "--out", tmp_path / "b.parquet") == 0
        shown = capsys.readouterr().out
        assert "2 rows are in no pair: they have a score and no distribution" in shown
        (found,) = read_rows(pairs)
        assert (found["chosen_key"], found["rejected_key"], found["probability"]) == ("k00003", "k00002", 1.0)
        assert [one["key"] for one in read_rows(tmp_path / "b.parquet")] == ["k00004"]
        assert metadata_in(pairs)["derived"][0]["counts"]["unpaired"] == 2
        assert zscore("select", path, "--pairs", pairs, "--score", "alignment", "--out", tmp_path / "b.parquet") == 0
        assert "in no pair" not in capsys.readouterr().out
        assert read_rows(pairs)[0]["rejected_key"] == "k00001"

    def test_pairs_need_a_file_and_a_file_needs_pairs(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row()])
        with pytest.raises(UsageError, match="give --pairs FILE too"):
            run(path, SelectOptions(pairs=PairOptions()))
        with pytest.raises(UsageError, match="--pairs .*p.parquet: no pairs are asked for"):
            run(path, SelectOptions(), pairs=str(tmp_path / "p.parquet"))
        assert [one.name for one in tmp_path.iterdir()] == ["s.parquet"]

    def test_distributions_are_needed(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", [row()])
        zscore(
            "filter",
            path,
            "--columns",
            "shard,index,key,prompt,group,status,overall,alignment",
            "--out",
            tmp_path / "k.parquet",
        )
        assert len(run(tmp_path / "k.parquet")[1]) == 1
        with pytest.raises(TableError, match=r"k\.parquet has no column 'sha256'"):
            run(tmp_path / "k.parquet", SelectOptions(pairs=PairOptions()), pairs=str(tmp_path / "p.parquet"))


numbers = st.integers(1, 5).map(str)
leaves = st.one_of(numbers, st.sampled_from(["left", "right", "overall", "0.5", "1e-1"]))
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(
            lambda parts: f"{parts[0]}({parts[1]}, {parts[2]})"
        ),
        inner.map(lambda one: f"-{one}"),
        inner.map(lambda one: f"(+{one})"),
    ),
    max_leaves=8,
)


class TestExpressions:
    @settings(max_examples=200, deadline=None)
    @given(expressions)
    def test_as_python_says(self, text: str) -> None:
        frame = pl.DataFrame({"left": [1.5, 3.0], "right": [2.0, 4.5], "overall": [1.75, 3.75]})
        try:
            expected = [eval(text, {**FUNCTIONS, **made}) for made in frame.to_dicts()]
        except ZeroDivisionError:
            expected = None
        try:
            expression = ScoreExpression(text, ["left", "right"])
        except UsageError as error:
            refused = str(error)
            expression = None
        if expression is None:
            assert "divides by zero" in refused or "names no dimension" in refused
            return
        found = frame.select(expression.expr().alias("x"))["x"].to_list()
        if expected is not None:
            assert found == pytest.approx([float(np.float32(value)) for value in expected], rel=1e-5, abs=1e-6)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("algnment", "there is no dimension 'algnment': did you mean 'alignment'?"),
            ("0.5*alignment + 0.5*relism", "did you mean 'realism'?"),
            ("alignment +", "isn't an expression"),
            ("", "isn't an expression"),
            ("alignment; realism", "isn't an expression"),
            ("alignment if realism else 1", "isn't understood; there are numbers, dimensions, overall, + - * /"),
            ("alignment ** 2", "'alignment ** 2' isn't understood"),
            ("alignment.real", "'alignment.real' isn't understood"),
            ("__import__('os')", "isn't understood"),
            ("max(alignment)", "'max(alignment)' isn't understood"),
            ("min(*[alignment, realism])", "isn't understood"),
            ("max(alignment, realism, key=1)", "isn't understood"),
            ("abs(alignment)", "isn't understood"),
            ("'alignment'", "isn't understood"),
            ("True", "isn't understood"),
            ("alignment > 3", "isn't understood"),
            ("[alignment]", "isn't understood"),
            ("(lambda: alignment)()", "isn't understood"),
            ("1 + 2", "names no dimension"),
            ("alignment / 0", "divides by zero"),
            ("alignment / (2 - 2)", "divides by zero"),
            ("alignment + 1e999", "isn't a finite number"),
            ("alignment + 1j", "isn't understood"),
            ("+".join(["alignment"] * 60), "characters, at most 500 are read"),
            ("(" * 300 + "alignment" + ")" * 190, "isn't an expression"),
            ("-" * 480 + "alignment", None),
        ],
    )
    def test_what_is_refused(self, text: str, said: str | None) -> None:
        if said is None:
            ScoreExpression(text, z_reward().names)
            return
        with pytest.raises(UsageError) as raised:
            ScoreExpression(text, z_reward().names)
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 2.0]), min_size=2, max_size=2), st.floats(0, 2))
    def test_risk_moves_each_dimension_against_you(self, factors, risk: float) -> None:
        made = {"left": 2.0, "right": 3.0, "overall": 2.5, "left_std": 0.5, "right_std": 0.25}
        text = f"{factors[0]}*left - (right*{factors[1]} + 1) / 2"
        corners = [
            factors[0] * (2 + a * risk * 0.5) - ((3 + b * risk * 0.25) * factors[1] + 1) / 2
            for a in (-1, 1)
            for b in (-1, 1)
        ]
        found = pl.DataFrame(made).select(x=ScoreExpression(text, ["left", "right"]).expr(risk))["x"][0]
        assert found == pytest.approx(min(corners), abs=1e-5)

    def test_risk_of_a_dimension_of_overall_and_of_functions(self) -> None:
        frame = pl.DataFrame({"left": [2.0], "right": [3.0], "overall": [2.5], "left_std": [0.5], "right_std": [0.25]})

        def at_risk(text: str) -> float:
            return frame.select(x=ScoreExpression(text, ["left", "right"]).expr(2.0))["x"][0]

        assert at_risk("left") == 1.0
        assert at_risk("overall") == 2.5 - 2 * 0.375
        assert at_risk("min(left, right)") == 1.0
        assert at_risk("max(left, right)") == 2.5
        assert at_risk("-left") == -3.0
        assert at_risk("6 - left/2") == 4.5
        for text in ("left*right", "left/right", "1/left"):
            with pytest.raises(UsageError, match="with --risk, multiply and divide by numbers only"):
                at_risk(text)

    def test_columns(self) -> None:
        expression = ScoreExpression("min(overall, left)", ["left", "right"])
        assert expression.columns() == ["overall", "left"]
        assert expression.columns(risk=1) == ["overall", "left", "left_std", "right_std"]

    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(
            [
                "left",
                "overall",
                "left*right",
                "left/right",
                "2*left - right",
                "-left",
                "min(left, 2)",
                "max(right, -left + 5)",
            ]
        ),
        st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=2, max_size=2),
    )
    def test_distribution_and_preference_against_every_combination(self, text: str, counts) -> None:
        made = []
        for one in counts:
            weights_DK = np.array(one, dtype=float).reshape(2, 3) + 0.01
            made.append(scores_of(weights_DK / weights_DK.sum(axis=1, keepdims=True), two()).probs_DK.astype(float))
        probs = {name: np.stack([one[d] for one in made]) for d, name in enumerate(("left", "right"))}
        support, found = ScoreExpression(text, ["left", "right"]).distribution(probs, VALUES)
        assert (np.diff(support) > 0).all()
        assert found.sum(axis=1) == pytest.approx([1, 1], abs=1e-6)
        rows = [{"left_probs": one[0], "right_probs": one[1]} for one in made]
        for n, one in enumerate(rows):
            expected = defaultdict(float)
            for (a, p), (b, q) in itertools.product(
                *(zip(VALUES, one[f"{d}_probs"], strict=True) for d in ("left", "right"))
            ):
                value = eval(text, {**FUNCTIONS, "left": a, "right": b, "overall": (a + b) / 2})
                expected[round(value, 9)] += p * q
            assert dict(zip(support.round(9).tolist(), found[n].tolist(), strict=True)) == pytest.approx(
                expected, abs=1e-6
            )
        assert preference(found[:1], found[1:])[0] == pytest.approx(naive_probability(*rows, text), abs=1e-5)

    def test_preference_is_antisymmetric_and_half_of_itself(self) -> None:
        random = np.random.default_rng(0)
        p, q = (random.dirichlet(np.ones(9), 50) for _ in range(2))
        assert preference(p, q) + preference(q, p) == pytest.approx(np.ones(50))
        assert preference(p, p) == pytest.approx(np.full(50, 0.5))

    def test_division_by_what_may_be_zero(self) -> None:
        expression = ScoreExpression("left / (right - 1)", ["left", "right"])
        one = np.full((1, 3), 1 / 3)
        with pytest.raises(UsageError, match="divides by 'right - 1', which may be 0"):
            expression.distribution({"left": one, "right": one}, VALUES)


class TestCommand:
    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        write_scores(tmp_path / "scores.parquet", random_rows(rows=100, groups=15))
        return tmp_path

    def test_it_works_as_it_stands(self, here: Path, capsys) -> None:
        assert zscore("select") == 0
        shown = capsys.readouterr().out
        assert "100 rows, 15 groups" in shown
        assert "no part: bad_image" in shown
        assert "candidates a group, median" in shown
        assert "over a random pick" in shown
        assert "wrote best.parquet" in shown
        assert len(read_rows(here / "best.parquet")) == 15
        step = metadata_in(here / "best.parquet")["derived"][0]
        assert step["criteria"] == {"best": 1, "by": "group", "score": "overall", "risk": 0.0}
        assert (step["counts"]["groups"], step["counts"]["selected"]) == (15, 15)

    def test_everything_at_once(self, here: Path, capsys) -> None:
        call = ["select", "scores.parquet", "--best", 2, "--score", "0.5*alignment+0.5*realism", "--risk", 0.5]
        call += [
            "--pairs",
            "p.parquet",
            "--max-pairs",
            0,
            "--min-gap",
            0.2,
            "--stats",
            "g.parquet",
            "--out",
            "b.parquet",
        ]
        assert zscore(*call) == 0
        pairs = read_rows(here / "p.parquet")
        assert f"{len(pairs)} pairs" in capsys.readouterr().out
        assert len(read_rows(here / "g.parquet")) == 15
        assert min(one["gap"] for one in pairs) >= 0.2
        assert max(one["select_rank"] for one in read_rows(here / "b.parquet")) == 2

    def test_a_dry_run_writes_nothing(self, here: Path, capsys) -> None:
        assert zscore("select", "--pairs", "p.parquet", "--stats", "g.parquet", "--dry-run") == 0
        assert "dry run: nothing is written" in capsys.readouterr().out
        assert zscore("select", "--dry-run", "--quiet") == 0
        assert capsys.readouterr().out == ""
        assert [path.name for path in here.iterdir()] == ["scores.parquet"]

    def test_nothing_to_select_is_no_error(self, here: Path, capsys) -> None:
        write_scores(here / "bad.parquet", [row(0, status="bad_image")])
        write_scores(here / "none.parquet", [])
        for name in ("bad.parquet", "none.parquet"):
            assert zscore("select", name, "--pairs", "p.parquet", "--stats", "g.parquet") == 0
            shown = capsys.readouterr().out
            assert "nothing is selected: no row has a group and a score" in shown
            assert "no pairs: no group has scores that differ enough" in shown
            assert [read_rows(here / one) for one in ("best.parquet", "p.parquet", "g.parquet")] == [[], [], []]
        assert list(pl.read_parquet_schema(here / "g.parquet")) == ["group", "candidates", "best", "mean", "gain"]

    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (["nope.parquet"], 1, "zscore: there is no nope.parquet"),
            (["--best", "0"], 2, "zscore: --best 0: keep at least 1 of each group"),
            (["--by", "promt"], 2, "zscore: --by: there is no column 'promt': did you mean 'prompt'?"),
            (["--score", "algnment"], 2, "did you mean 'alignment'?"),
            (["--risk", "-1"], 2, "zscore: --risk -1: give 0 or more"),
            (["--risk", "nan"], 2, "zscore: --risk nan: give 0 or more"),
            (["--out", "scores.parquet"], 2, "is the table that is read"),
            (["--min-gap", "0.5"], 2, "zscore: --min-gap and --max-pairs say which pairs are taken: give --pairs FILE"),
            (["--max-pairs", "1"], 2, "give --pairs FILE too"),
            (["--pairs", "p.parquet", "--min-gap", "nan"], 2, "zscore: --min-gap nan: give 0 or more"),
            (["--pairs", "p.parquet", "--min-gap", "inf"], 2, "zscore: --min-gap inf: give 0 or more"),
            (["--pairs", "best.parquet"], 2, "--pairs and --out name the same file"),
        ],
    )
    def test_errors_are_one_line(self, here: Path, capsys, arguments: list[str], code: int, said: str) -> None:
        assert zscore("select", *arguments) == code
        shown = capsys.readouterr().err
        assert said in shown
        assert shown.count("\n") == 1
        assert [path.name for path in here.iterdir()] == ["scores.parquet"]

    def test_the_same_call_writes_the_same_bytes(self, here: Path) -> None:
        found = []
        for _ in range(3):
            assert zscore("select", "--best", 2, "--pairs", "p.parquet", "--stats", "g.parquet", "-q") == 0
            found.append(b"".join((here / name).read_bytes() for name in ("best.parquet", "p.parquet", "g.parquet")))
        assert len(set(found)) == 1

    def test_help_states_the_tie_rule(self, capsys) -> None:
        assert zscore("select", "--help") == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "of equal scores (they are float32) the row that comes first in the input" in shown
