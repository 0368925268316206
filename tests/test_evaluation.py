"""All metrics of a table at once, undefined ones included, and the command."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from tests.command import zscore
from tests.scores_factory import random_rows, rewrite, row, write_scores, z_reward
from tests.test_matching import DIMENSIONS, LEVELS, matched, ratings_of, scores_frame
from zscore import agreement
from zscore.agreement import Bootstrap, Estimate
from zscore.evaluation import evaluate
from zscore.human import aggregate
from zscore.matching import match
from zscore.samples import read_samples
from zscore.shards import expand


class TestEvaluate:
    def test_everything_at_once(self):
        scores = scores_frame([("a.tar", i, f"k{i}", f"p{i // 4}") for i in range(40)])
        rng = np.random.default_rng(1)
        rows = [
            (f"k{i}", name, str(rater), int(np.clip(round(scores[name][i] + rng.normal()), 1, 5)))
            for i in range(40)
            for name in DIMENSIONS
            for rater in range(5)
        ]
        ratings = ratings_of(rows, ["key", "dimension", "rater", "score"])
        found = match(scores.lazy(), DIMENSIONS, ratings, aggregate(ratings, "trimmed"))
        result = evaluate(found, LEVELS, bootstrap=Bootstrap(replicates=200, seed=3))
        assert [report.dimension for report in result.dimensions] == ["alignment", "realism", "overall"]
        for report in result.dimensions:
            assert report.samples == 40
            assert report.groups == 10
            for name, estimate in (report.metrics | report.distribution).items():
                if name == "ece":
                    assert (estimate.low, estimate.high, estimate.draws) == (None, None, 0)
                    assert estimate.undefined.startswith("no interval")
                else:
                    assert estimate.low <= estimate.value <= estimate.high
                    assert estimate.draws == 200
        assert result.dimensions[0].ratings == 120  # three of five are left
        assert result.dimensions[0].scale == "1, 2, 3, 4, 5"
        assert result == evaluate(found, LEVELS, bootstrap=Bootstrap(replicates=200, seed=3))
        json.dumps(result.as_dict(), allow_nan=False)

    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_few_samples(self, count):
        scores = scores_frame([("a.tar", i, f"k{i}", "p") for i in range(5)])
        rows = [(f"k{i}", i + 1) for i in range(count)] or [("k0", 1)]
        result = evaluate(matched(scores, ratings_of(rows, ["key", "score"])), LEVELS)
        report = result.dimensions[0]
        assert report.metrics["srcc"].undefined == f"{max(count, 1)} samples, at least 3 are needed"
        json.dumps(result.as_dict(), allow_nan=False)

    def test_constant_scores(self):
        scores = scores_frame([("a.tar", i, f"k{i}", "p") for i in range(5)]).with_columns(alignment=pl.lit(3.0))
        result = evaluate(matched(scores, ratings_of([(f"k{i}", i) for i in range(5)], ["key", "score"])), LEVELS)
        metrics = result.dimensions[0].metrics
        assert metrics["plcc"].undefined == "all scores are equal"
        assert metrics["hpa"].value == 0
        assert metrics["hpa_half_ties"].value == 0.5

    def test_float32_noise_does_not_break_ties(self):
        scores = scores_frame([("a.tar", i, f"k{i}", "p") for i in range(3)]).with_columns(
            alignment=pl.Series([1 / 3, 1 / 3 + 1e-12, 2.0])
        )
        result = evaluate(matched(scores, ratings_of([("k0", 1), ("k1", 2), ("k2", 3)], ["key", "score"])), LEVELS)
        assert result.dimensions[0].score_ties == 1

    def test_big_kendall_goes_through_the_loop(self, monkeypatch):
        monkeypatch.setattr(agreement, "KENDALL_MATRIX_SAMPLES", 2)
        monkeypatch.setattr(agreement, "KENDALL_LOOP_WORK", 50 * 300)
        x = np.random.default_rng(0).normal(size=50)
        points, functions = agreement.correlations(x, x, np.arange(50), 50)
        Bootstrap(replicates=1000).estimates(points, functions, (50, 50))
        assert points["krcc"].low == pytest.approx(1)
        assert (points["krcc"].draws, points["srcc"].draws) == (300, 1000)

    def test_kendall_of_too_many_samples_has_no_interval(self, monkeypatch):
        monkeypatch.setattr(agreement, "KENDALL_MATRIX_SAMPLES", 2)
        monkeypatch.setattr(agreement, "KENDALL_LOOP_WORK", 50 * 199)
        x = np.random.default_rng(0).normal(size=50)
        points, functions = agreement.correlations(x, x, np.arange(50), 50)
        Bootstrap(replicates=1000).estimates(points, functions, (50, 50))
        assert points["krcc"] == Estimate(pytest.approx(1), undefined="too many samples for an interval")


@pytest.fixture
def files(tmp_path):
    """A scores file and ratings of its good rows by four raters."""
    made = random_rows(rows=60, groups=12)
    rng = np.random.default_rng(0)
    lines = ["shard,key,dimension,rater,score"]
    for one in made:
        if one.scores is not None:
            for d, name in enumerate(z_reward().names):
                for rater in range(4):
                    score = int(np.clip(round(float(one.scores.mean_D[d]) + rng.normal()), 1, 5))
                    lines.append(f"{one.shard.removesuffix('.tar')},{one.key},{name},r{rater},{score}")
    (tmp_path / "human.csv").write_text("\n".join(lines))
    return write_scores(tmp_path / "scores.parquet", made), tmp_path / "human.csv"


class TestCommand:
    def test_table(self, files):
        code, out, err = zscore("eval", *files, "--bootstrap", 100)
        assert (code, err) == (0, "")
        assert "matched by shard and key" in out
        assert "HPA, tied scores wrong (eq. 17)" in out
        assert "overall: mean of alignment, realism, aesthetics, plausibility" in out
        assert "nan" not in out.lower()

    def test_json(self, files):
        code, out, _ = zscore("eval", *files, "--bootstrap", 50, "--json", "--seed", 4)
        assert code == 0
        report = json.loads(out)["scores"]
        assert report["bootstrap"] == {"replicates": 50, "level": 0.95, "seed": 4}
        assert [one["dimension"] for one in report["dimensions"]] == [*z_reward().names, "overall"]
        assert set(report["dimensions"][0]["metrics"]["plcc"]) == {"value", "low", "high", "undefined", "draws"}

    def test_votes(self, files, tmp_path):
        (tmp_path / "votes.csv").write_text("prompt_id,vote\n1,good\n2,bad\n3,good\n")
        code, out, _ = zscore("eval", "--gsb", tmp_path / "votes.csv")
        assert (code, out.splitlines()[0]) == (0, "2 good, 0 same, 1 bad on 3 prompts")
        assert out.splitlines()[1].startswith("GSB (eq. 21): 0.333 [")
        code, out, _ = zscore("eval", *files, "--gsb", tmp_path / "votes.csv", "--json", "--bootstrap", 20)
        assert set(json.loads(out)) == {"votes", "scores"}

    def test_no_ratings(self, files, tmp_path):
        (tmp_path / "none.csv").write_text("key,score\n")
        code, out, _ = zscore("eval", files[0], tmp_path / "none.csv")
        assert (code, "holds no ratings" in out) == (0, True)

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            ((), 2, "give SCORES and HUMAN"),
            (("SCORES",), 2, "give SCORES and HUMAN"),
            (("SCORES", "HUMAN", "--aggregate", "median"), 2, "none of trimmed, mean"),
            (("SCORES", "HUMAN", "--column", "key"), 2, "--column 'key': give A=B"),
            (("SCORES", "HUMAN", "--map", "mood=realism"), 2, "rates aesthetics, alignment"),
            (("SCORES", "HUMAN", "--by", "grup"), 2, "did you mean group"),
            (("SCORES", "HUMAN", "--margin", "inf"), 2, "--margin inf: give a finite number of at least 0"),
            (("SCORES", "HUMAN", "--margin", "inf", "--json"), 2, "--margin inf: give a finite number of at least 0"),
            (("SCORES", "none.csv"), 1, "none.csv: no such file"),
            (("none.parquet", "HUMAN"), 1, "none.parquet"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, files, arguments, code, message):
        places = {"SCORES": files[0], "HUMAN": files[1]}
        found, out, err = zscore("eval", *(places.get(argument, argument) for argument in arguments))
        assert (found, out) == (code, "")
        assert message in err
        assert err.count("\n") == 1

    def test_no_ratings_and_votes(self, files, tmp_path):
        """The votes are printed all the same, and JSON stays JSON."""
        (tmp_path / "none.csv").write_text("key,score\n")
        (tmp_path / "votes.csv").write_text("vote\ngood\nbad\n")
        call = ("eval", files[0], tmp_path / "none.csv", "--gsb", tmp_path / "votes.csv")
        code, out, err = zscore(*call, "--json")
        assert (code, "holds no ratings" in err, set(json.loads(out))) == (0, True, {"votes"})
        code, out, err = zscore(*call)
        assert (code, err, "holds no ratings" in out, "1 good, 0 same, 1 bad" in out) == (0, "", True, True)
        code, out, err = zscore("eval", files[0], tmp_path / "none.csv", "--json")
        assert (code, json.loads(out), "holds no ratings" in err) == (0, {}, True)

    def test_samples_without_a_finite_score_are_counted(self, files, tmp_path):
        table = pl.read_parquet(files[0])
        first = pl.int_range(pl.len()) == int((table["status"] == "ok").arg_max())
        nan = table.with_columns(pl.when(first).then(float("nan")).otherwise("realism").alias("realism"))
        scores = rewrite(nan.to_arrow(), tmp_path / "nan.parquet")
        code, out, err = zscore("eval", scores, files[1], "--bootstrap", 20)
        assert (code, err) == (0, "")
        assert "realism: 1 samples left out, whose score or distribution isn't finite" in out
        assert "alignment: 1 samples" not in out

    @pytest.mark.parametrize("command", ["eval", "calibrate"])
    def test_a_broken_table_is_one_line(self, files, tmp_path, command):
        whole = bytearray(files[0].read_bytes())
        whole[4 : len(whole) // 2] = bytes(len(whole) // 2 - 4)
        (tmp_path / "broken.parquet").write_bytes(whole)
        out = () if command == "eval" else ("--out", tmp_path / "c.json")
        code, text, err = zscore(command, tmp_path / "broken.parquet", files[1], *out)
        assert (code, text, err.count("\n")) == (1, "", 1)
        assert "can't read" in err
        assert "broken.parquet" in err

    @pytest.mark.parametrize("command", ["eval", "calibrate"])
    def test_no_option_is_advised_that_is_not_there(self, tmp_path, command):
        for name, layout in (("a", "joint"), ("b", "separate")):
            write_scores(tmp_path / "mixed" / f"{name}.parquet", [row()], layout=layout)
        (tmp_path / "human.csv").write_text("key,score\nk00000,3\n")
        code, _, err = zscore(command, tmp_path / "mixed", tmp_path / "human.csv")
        assert (code, "weren't scored alike: layout" in err, "--allow" in err) == (1, True, False)
        assert "pass --allow-mixed" in zscore("filter", tmp_path / "mixed", "--out", tmp_path / "k.parquet")[2]

    def test_names_in_files_do_not_steer_the_terminal(self, files, tmp_path):
        evil = "\x1b[31mred\x07\u202e"
        human = tmp_path / "human.csv"
        for text in (
            f"key,score\n{evil},3\n",
            f"shard,key,score\n{evil},k,3\n",
            f"key,score\n{evil},x\n",
            f"key,{evil}\nk,3\n",
            f"key,dimension,score\nk,{evil},3\n",
            f"key,dimension,score\nk00000,realism,3\nk00000,{evil},3\n",
        ):
            human.write_text(text)
            _, out, err = zscore("eval", files[0], human, "--bootstrap", 20)
            assert (out + err).replace("\n", "").isprintable()
            assert "red" in out + err
        twice = write_scores(tmp_path / "twice.parquet", [row(0, key=evil), row(1, key=evil)])
        human.write_text(f"key,score\n{evil},3\n")
        _, _, err = zscore("eval", twice, human)
        assert "match more than one scored row" in err
        assert err.removesuffix("\n").isprintable()

    def test_an_interval_of_fewer_draws_says_so(self, files, monkeypatch):
        monkeypatch.setattr(agreement, "KENDALL_MATRIX_SAMPLES", 2)
        monkeypatch.setattr(agreement, "KENDALL_LOOP_WORK", 60 * 250)
        _, out, _ = zscore("eval", *files, "--bootstrap", 400)
        line = next(line for line in out.splitlines() if "the interval is from" in line)
        assert "alignment, realism, aesthetics, plausibility, overall, KRCC (Kendall tau-b)" in line
        assert "ECE: no interval" in out

    def test_real_ratings(self, shared_data, tmp_path):
        """134 pictures in 27 groups of up to five; the scores are one rater's."""
        ratings = pl.read_csv(shared_data / "avt-ratings.csv").filter(pl.col("rater") == 3)
        of_rater = {(shard, key, name): score for shard, key, _, name, _, score in ratings.iter_rows()}
        made = []
        for shard in expand([str(shared_data / "avt-shards")]):
            for sample in read_samples(shard):
                stem = shard.name.removesuffix(".tar")
                means = [of_rater.get((stem, sample.key, name), 3) for name in z_reward().names]
                named = {"shard": shard.name, "key": sample.key, "group": sample.group}
                made.append(row(sample.index, means=means, **named))
        scores = write_scores(tmp_path / "scores.parquet", made)
        code, out, err = zscore("eval", scores, shared_data / "avt-ratings.csv", "--json", "--bootstrap", 200)
        assert (code, err) == (0, "")
        reports = {one["dimension"]: one for one in json.loads(out)["scores"]["dimensions"]}
        assert list(reports) == ["alignment", "realism", "aesthetics", "overall"]
        assert reports["overall"]["note"] == "mean of alignment, realism, aesthetics"
        for one in reports.values():
            assert (one["samples"], one["groups"]) == (134, 27)
            # One person agrees with the mean of 22 clearly and not perfectly, and sees large gaps better.
            assert 0.4 < one["metrics"]["srcc"]["low"] < one["metrics"]["srcc"]["value"] < 0.95
            assert one["metrics"]["margin_hpa_half_ties"]["value"] > one["metrics"]["hpa_half_ties"]["value"] > 0.6
