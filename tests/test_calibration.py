"""The fit, the conformal threshold and its guarantee, and the file."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.command import zscore
from tests.scores_factory import metadata_of, random_rows, rewrite, row, write_scores, z_reward
from zscore.calibration import (
    Calibration,
    Fit,
    Reference,
    apply_calibration,
    check_made_for,
    confident_threshold,
    read_calibration,
    recalibrated,
    select_confident,
    write_calibration,
)
from zscore.errors import TableError, UsageError
from zscore.fitting import calibrate, fit_distribution
from zscore.human import Ratings, aggregate
from zscore.matching import match

LEVELS = np.array([1 + k / 2 for k in range(9)])
DIMENSIONS = ("alignment", "realism")
EMPTY = Calibration(tuple(LEVELS), DIMENSIONS, {}, {}, {})


def with_reference(score, human, column="overall"):
    return Calibration(tuple(LEVELS), DIMENSIONS, {}, {column: Reference(tuple(score), tuple(human))}, {})


def naive_selection(scores, reference, minimum, alpha):
    """Conformal p-values and Benjamini-Hochberg, step by step."""
    n = len(reference)
    p_values = []
    for score in scores:
        worse = sum(1 for s, human in reference if human < minimum and s >= score)
        p_values.append((1 + worse) / (n + 1))
    ranked = sorted(p_values)
    k = max((k for k in range(1, len(ranked) + 1) if ranked[k - 1] <= alpha * k / len(ranked) + 1e-12), default=0)
    cut = ranked[k - 1] if k else -1
    return [p <= cut for p in p_values]


grid = st.integers(2, 10).map(lambda value: value / 2)


class TestSelection:
    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(grid, max_size=30),
        st.lists(st.tuples(grid, grid), max_size=40),
        grid,
        st.sampled_from([0.5, 0.7, 0.8, 0.9]),
    )
    def test_like_benjamini_hochberg_by_hand(self, scores, reference, minimum, confidence):
        calibration = with_reference([s for s, _ in reference], [human for _, human in reference])
        mask = select_confident(pl.Series(scores, dtype=pl.Float64), calibration, minimum, confidence)
        assert mask.to_list() == naive_selection(scores, reference, minimum, 1 - confidence)

    def test_null_scores_are_not_kept(self):
        calibration = with_reference(range(40), [5.0] * 40)
        mask = select_confident(pl.Series([None, 3.0, float("nan")]), calibration, 4.0, 0.9)
        assert mask.to_list() == [False, True, False]

    def test_too_few_ratings_keep_nothing(self):
        calibration = with_reference([1, 2, 3], [5, 5, 5])
        assert confident_threshold(pl.Series([9.0] * 5), calibration, 4.0, 0.9) == float("inf")
        assert select_confident(pl.Series([], dtype=pl.Float32), calibration, 4.0, 0.9).to_list() == []

    def test_wrong_calls(self):
        calibration = with_reference([1], [5], "realism")
        with pytest.raises(UsageError, match="no human scores of 'overall', only of realism"):
            confident_threshold(pl.Series([1.0]), calibration, 4.0, 0.9)
        for confidence in (0, 1, 1.5):
            with pytest.raises(UsageError, match="between 0 and 1"):
                confident_threshold(pl.Series([1.0]), calibration, 4.0, confidence, "realism")


@pytest.mark.parametrize(("noise", "decimals"), [(0.5, 6), (1.5, 6), (0.8, 0)])
def test_the_guarantee_holds_over_many_draws(noise, decimals):
    """On average over 600 draws of ratings and scores, at most 10 % of the kept are truly below 4."""
    rng = np.random.default_rng(17)
    false_shares, kept_shares = [], []
    for _ in range(600):
        truth = np.clip(np.round(rng.normal(3.6, 0.9, size=500) * 2) / 2, 1, 5)
        score = np.round(truth + rng.normal(0, noise, size=500), decimals)
        calibration = with_reference(score[:200], truth[:200])
        kept = select_confident(pl.Series(score[200:]), calibration, 4.0, 0.9).to_numpy()
        wrong = truth[200:][kept] < 4
        false_shares.append(wrong.mean() if kept.any() else 0.0)
        kept_shares.append(kept.mean())
    error = np.std(false_shares) / np.sqrt(len(false_shares))
    assert np.mean(false_shares) <= 0.1 + 2 * error
    if noise < 1 and decimals:  # and it isn't kept by keeping nothing, or by being far too strict
        assert np.mean(kept_shares) > 0.2
        assert np.mean(false_shares) > 0.07


@pytest.mark.parametrize(("minimum", "confidence"), [(3.0, 0.7), (4.5, 0.8), (2.0, 0.95)])
def test_the_guarantee_holds_for_any_bound(minimum, confidence):
    """Two hundred draws each, among them bounds that nearly all or hardly any picture reaches."""
    rng = np.random.default_rng(int(10 * minimum))
    false_shares = []
    for _ in range(200):
        truth = np.clip(np.round(rng.normal(3.5, 1.0, size=400) * 2) / 2, 1, 5)
        score = truth + rng.normal(0, 0.7, size=400)
        calibration = with_reference(score[:150], truth[:150], "realism")
        kept = select_confident(pl.Series(score[150:]), calibration, minimum, confidence, "realism").to_numpy()
        false_shares.append((truth[150:][kept] < minimum).mean() if kept.any() else 0.0)
    assert np.mean(false_shares) <= 1 - confidence + 2 * np.std(false_shares) / np.sqrt(200)


def test_scores_that_say_nothing_keep_next_to_nothing():
    """Noise can't reach a share of 90 % where half are bad, and mustn't pretend to."""
    rng = np.random.default_rng(0)
    kept_shares = []
    for _ in range(100):
        truth = rng.choice([3.0, 5.0], size=600)
        calibration = with_reference(rng.normal(size=300), truth[:300])
        kept_shares.append(select_confident(pl.Series(rng.normal(size=300)), calibration, 4.0, 0.9).mean())
    assert np.mean(kept_shares) < 0.02


def test_more_confidence_never_keeps_more():
    rng = np.random.default_rng(1)
    truth = rng.integers(2, 11, size=300) / 2
    calibration = with_reference(truth + rng.normal(0, 0.6, size=300), truth)
    scores = pl.Series(rng.normal(3.5, 1.2, size=500))
    thresholds = [confident_threshold(scores, calibration, 4.0, level) for level in (0.5, 0.7, 0.9, 0.95, 0.99)]
    assert thresholds == sorted(thresholds)
    bounds = [confident_threshold(scores, calibration, minimum, 0.8) for minimum in (1.0, 2.5, 4.0, 5.0)]
    assert bounds == sorted(bounds)
    assert bounds[0] == -np.inf  # all are at least 1


class TestFit:
    @pytest.mark.parametrize(("temperature", "shift"), [(0.5, 0.0), (2.0, 0.0), (1.0, 0.7), (1.6, -0.5)])
    def test_finds_what_was_done(self, temperature, shift):
        rng = np.random.default_rng(3)
        truth = rng.dirichlet(np.full(9, 0.6), size=3000)
        # The model is the truth, spoilt: the fit has to undo it.
        spoilt = recalibrated(truth, LEVELS, 1 / temperature, -shift * temperature)
        found = fit_distribution(spoilt, truth, LEVELS, np.eye(9))
        assert found[:2] == pytest.approx((temperature, shift), abs=0.02)
        assert not found[2]

    def test_gradient(self):
        from scipy.optimize import check_grad, minimize

        rng = np.random.default_rng(0)
        probs, human = rng.dirichlet(np.ones(9), size=30), rng.dirichlet(np.ones(5), size=30)
        split = np.maximum(0, 1 - np.abs(LEVELS[:, None] - np.arange(1.0, 6)))
        losses = []

        def watched(loss, start, **options):
            points = np.array([[1.0, 0.0], [0.3, 1.2], [2.0, -0.5]])
            losses.extend(check_grad(lambda t: loss(t)[0], lambda t: loss(t)[1], theta) for theta in points)
            return minimize(loss, start, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("zscore.fitting.minimize", watched)
            fit_distribution(probs, human, LEVELS, split)
        assert max(losses) < 1e-5

    def test_uninformative_scores_end_at_a_bound(self):
        probs = np.full((50, 9), 1 / 9)
        probs[:, 0] += 0.001
        human = np.tile(np.eye(9)[8], (50, 1))
        assert fit_distribution(probs / probs.sum(axis=1, keepdims=True), human, LEVELS, np.eye(9))[2]


def scores_frame(samples, seed=0, per_group=4):
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame(
        {
            "shard": ["a.tar"] * samples,
            "index": range(samples),
            "key": [f"k{i}" for i in range(samples)],
            "group": [f"p{i // per_group}" for i in range(samples)],
        }
    )
    for name in DIMENSIONS:
        probs = rng.dirichlet(np.full(9, 0.7), size=samples)
        mean = probs @ LEVELS
        std = np.sqrt(((LEVELS - mean[:, None]) ** 2 * probs).sum(axis=1))
        entropy = -(probs * np.log(np.maximum(probs, 1e-30))).sum(axis=1)
        frame = frame.with_columns(
            pl.Series(name, mean, dtype=pl.Float32),
            pl.Series(f"{name}_std", std, dtype=pl.Float32),
            pl.Series(f"{name}_entropy", entropy, dtype=pl.Float32),
            pl.Series(f"{name}_probs", probs.astype(np.float32), dtype=pl.Array(pl.Float32, 9)),
        )
    return frame.with_columns(overall=pl.mean_horizontal(DIMENSIONS))


def with_failures(frame):
    """Every third row unscored."""
    names = [name for name in frame.columns if name.startswith((*DIMENSIONS, "overall"))]
    failed = pl.int_range(pl.len()) % 3 == 1
    return frame.with_columns(pl.when(failed).then(None).otherwise(pl.col(name)).alias(name) for name in names)


class TestApply:
    calibration = Calibration(tuple(LEVELS), DIMENSIONS, {"alignment": Fit(1.7, 0.4)}, {}, {})

    def test_nothing_fitted_changes_nothing(self):
        frame = scores_frame(10)
        assert apply_calibration(frame, EMPTY).equals(frame)
        assert apply_calibration(frame, Calibration(tuple(LEVELS), DIMENSIONS, {"realism": Fit()}, {}, {})).equals(
            frame
        )

    def test_like_plain_numpy(self):
        frame = with_failures(scores_frame(20))
        found = apply_calibration(frame, self.calibration)
        assert found.schema == frame.schema
        assert found.columns == frame.columns
        for before, after in zip(frame.iter_rows(named=True), found.iter_rows(named=True), strict=True):
            assert after["realism_probs"] == before["realism_probs"]
            if before["alignment"] is None:
                assert after["alignment"] is after["alignment_probs"] is after["overall"] is None
                continue
            weights = np.array(before["alignment_probs"], float) ** (1 / 1.7) * np.exp(0.4 * LEVELS)
            probs = weights / weights.sum()
            assert after["alignment_probs"] == pytest.approx(probs, abs=1e-5)
            assert after["alignment"] == pytest.approx(probs @ LEVELS, abs=1e-5)
            assert after["alignment_std"] ** 2 == pytest.approx(probs @ LEVELS**2 - (probs @ LEVELS) ** 2, abs=1e-4)
            assert after["alignment_entropy"] == pytest.approx(-np.sum(probs * np.log(probs)), abs=1e-4)
            assert after["overall"] == pytest.approx((after["alignment"] + after["realism"]) / 2, abs=1e-6)

    def test_identity_of_the_formula(self):
        probs = np.random.default_rng(0).dirichlet(np.ones(9), size=5)
        assert recalibrated(probs, LEVELS, 1.0, 0.0) == pytest.approx(probs, abs=1e-6)

    def test_lazy_and_streamed(self):
        frame = with_failures(scores_frame(50))
        eager = apply_calibration(frame, self.calibration)
        assert apply_calibration(frame.lazy(), self.calibration).collect(engine="streaming").equals(eager)

    @pytest.mark.parametrize("rows", [0, 1])
    def test_all_null(self, rows):
        frame = with_failures(scores_frame(3))[1 : 1 + rows]
        assert apply_calibration(frame, self.calibration).equals(frame)

    def test_only_some_columns(self):
        frame = scores_frame(4).select("key", "alignment", "alignment_probs")
        assert apply_calibration(frame, self.calibration).columns == frame.columns
        with pytest.raises(TableError, match="no column alignment_probs"):
            apply_calibration(frame.drop("alignment_probs"), self.calibration)

    def test_overall_is_never_half_calibrated(self):
        frame = scores_frame(4).select("key", "alignment", "alignment_probs", "overall")
        with pytest.raises(TableError, match="have 'overall' but no column realism, so that it can't be renewed"):
            apply_calibration(frame, self.calibration)
        assert apply_calibration(frame, EMPTY).equals(frame)

    def test_overall_is_null_where_a_dimension_is(self):
        frame = scores_frame(4).with_columns(realism=pl.lit(None, pl.Float32))
        assert apply_calibration(frame, self.calibration)["overall"].null_count() == 4


def rated(frame, *, raters=5, seed=1, temperature=2.0, dimensions=DIMENSIONS):
    """Raters who draw from the scores' distributions at another temperature."""
    rng = np.random.default_rng(seed)
    tables = []
    for name in dimensions:
        probs = recalibrated(frame[f"{name}_probs"].to_numpy().astype(float), LEVELS, temperature, 0.0)
        drawn = LEVELS[(rng.random((len(frame), raters, 1)) > np.cumsum(probs, axis=1)[:, None, :-1]).sum(axis=2)]
        columns = {"key": frame["key"], "dimension": name, "rater": [[str(i) for i in range(raters)]] * len(frame)}
        lists = pl.Series(drawn, dtype=pl.Array(pl.Float64, raters)).arr.to_list()
        tables.append(pl.DataFrame(columns).with_columns(score=lists).explode("rater", "score"))
    table = pl.concat(tables)
    return Ratings(table, relative=False, source="human.csv")


def run(frame, ratings, **options):
    aggregated = aggregate(ratings, "mean")

    def matched(calibration):
        return match(apply_calibration(frame, calibration).lazy(), DIMENSIONS, ratings, aggregated)

    return calibrate(matched(EMPTY), EMPTY, matched, **options)


class TestCalibrate:
    def test_end_to_end(self):
        frame = scores_frame(600)
        found = run(frame, rated(frame))
        for name in DIMENSIONS:
            fit = found.fits[name]
            assert fit.temperature == pytest.approx(2.0, abs=0.3)
            assert fit.shift == pytest.approx(0.0, abs=0.15)
            assert fit.nll_after < fit.nll_before
            assert fit.samples == 300
        assert set(found.references) == {"alignment", "realism", "overall"}
        assert len(found.references["overall"].score) == 300
        calibrated = apply_calibration(frame, found)
        known = set(calibrated["overall"].cast(pl.Float64).round(9))
        assert set(found.references["overall"].score) <= known
        assert run(frame, rated(frame)) == found

    def test_halves_share_no_prompt(self):
        frame = scores_frame(40)
        found = run(frame, rated(frame), fit_share=0.3)
        means = apply_calibration(frame, found)["alignment"].cast(pl.Float64).round(9).to_list()
        held = [means.index(score) // 4 for score in found.references["alignment"].score]
        assert len(held) == 28
        assert all(held.count(group) == 4 for group in set(held))

    def test_without_a_fit(self):
        frame = scores_frame(30)
        found = run(frame, rated(frame), fit_share=0)
        assert found.fits["realism"] == Fit(samples=0)
        assert len(found.references["realism"].score) == 30

    def test_few_samples_stay_as_they_are(self):
        frame = scores_frame(12)
        fit = run(frame, rated(frame)).fits["realism"]
        assert fit.is_identity
        assert fit.note == "4 samples to fit, at least 20 are needed: left as it is"

    def test_overall_needs_all_dimensions(self):
        frame = scores_frame(60)
        found = run(frame, rated(frame, dimensions=("realism",)))
        assert set(found.references) == {"realism"}

    def test_wrong_calls(self):
        frame = scores_frame(30)
        with pytest.raises(UsageError, match="--fit-share 1"):
            run(frame, rated(frame), fit_share=1.0)
        votes = rated(frame)
        with pytest.raises(TableError, match="ranks and votes"):
            run(frame, Ratings(votes.frame, relative=True, source="votes"))

    def test_select_after_calibration_keeps_its_promise(self):
        """The whole way, on held-out prompts: fitted, thresholded, checked."""
        shares = []
        for seed in range(12):
            frame = scores_frame(800, seed=seed, per_group=1)
            ratings = rated(frame, raters=25, seed=seed + 100)
            first = pl.col("key").is_in(frame["key"][:400].to_list())
            found = run(frame[:400], Ratings(ratings.frame.filter(first), relative=False, source="h"))
            rest = apply_calibration(frame[400:], found)
            kept = rest.filter(select_confident(rest["realism"], found, 3.5, 0.8, "realism"))
            truth = aggregate(ratings, "mean").filter(pl.col("dimension") == "realism")
            human = kept.join(truth, on="key")["score"]
            shares.append((human < 3.5).mean() if human.len() else 0.0)
        assert np.mean(shares) <= 0.2 + 2 * np.std(shares) / np.sqrt(12)


@pytest.fixture
def files(tmp_path):
    """A scores file and ratings of its good rows by four raters."""
    made = random_rows(rows=200, groups=60, failed=0.02)
    lines = ["shard,key,dimension,rater,score"]
    rng = np.random.default_rng(0)
    for one in made:
        for d, name in enumerate(z_reward().names if one.scores is not None else ()):
            for rater in range(4):
                score = int(np.clip(round(float(one.scores.mean_D[d]) + rng.normal()), 1, 5))
                lines.append(f"{one.shard},{one.key},{name},{rater},{score}")
    (tmp_path / "human.csv").write_text("\n".join(lines))
    return write_scores(tmp_path / "scores.parquet", made), tmp_path / "human.csv"


class TestFile:
    full = Calibration(
        tuple(LEVELS),
        DIMENSIONS,
        {"realism": Fit(1.5, -0.2, 40, 1.3, 1.2)},
        {"realism": Reference((1.5, 2.25), (1.0, 4.333333333))},
        {"rubric": {"name": "z-reward", "hash": "h"}, "model": {"id": "m", "weights": "w"}},
    )

    def test_round_trip(self, tmp_path):
        path = str(tmp_path / "calibration.json")
        write_calibration(self.full, path)
        assert read_calibration(path) == self.full
        assert "expected share" in json.loads((tmp_path / "calibration.json").read_text())["guarantee"]
        assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.json"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[]", "isn't a calibration"),
            ("{}", "isn't a calibration"),
            ("not json", "isn't a calibration"),
            ('{"zscore_calibration": 9}', "of version 9"),
            ('{"zscore_calibration": 1}', "isn't a calibration"),
        ],
    )
    def test_other_files(self, tmp_path, text, message):
        path = tmp_path / "calibration.json"
        path.write_text(text)
        with pytest.raises(TableError, match=message):
            read_calibration(str(path))

    def test_missing_file(self, tmp_path):
        with pytest.raises(TableError, match="no such file"):
            read_calibration(str(tmp_path / "none.json"))

    def test_scores_of_another_model_or_rubric(self):
        good = {"rubric": {"name": "x", "hash": "h"}, "model": {"id": "m", "weights": "w"}}
        check_made_for(self.full, good, "scores.parquet")
        with pytest.raises(
            TableError, match="scores.parquet was scored with rubric 'x', hash other, the calibration is"
        ):
            check_made_for(self.full, good | {"rubric": {"name": "x", "hash": "other"}}, "scores.parquet")
        with pytest.raises(TableError, match="model 'm', weights v, the calibration is for 'm', weights w"):
            check_made_for(self.full, good | {"model": {"id": "m", "weights": "v"}}, "scores.parquet")

    @pytest.mark.parametrize(
        ("field", "other", "message"),
        [
            ("layout", "separate", "scored with layout 'separate', the calibration is for 'joint'"),
            ("template", "2" * 64, "scored with template '222222222222', the calibration is for '111111111111'"),
            ("max_pixels", 4096, "scored with max_pixels '4096', the calibration is for '1048576'"),
            ("rubric", {"name": "two", "hash": "h"}, "scored with rubric 'two', hash h"),
            ("model", {"id": "m", "weights": "w"}, "scored with model 'm', weights w"),
        ],
    )
    def test_scores_that_were_made_otherwise(self, files, tmp_path, field, other, message):
        """All that keeps two tables apart keeps a calibration and a table apart."""
        out = tmp_path / "c.json"
        assert zscore("calibrate", *files, "--out", out)[0] == 0
        made, metadata = read_calibration(str(out)), metadata_of([])
        check_made_for(made, metadata, "s.parquet")
        with pytest.raises(TableError, match=message):
            check_made_for(made, metadata | {field: other}, "s.parquet")
        if field != "rubric":  # the made-up one has no dimensions
            table = write_scores(tmp_path / "other.parquet", random_rows(rows=20), **{field: other})
            code, _, err = zscore("filter", table, "--calibration", out, "--min", 3, "--out", tmp_path / "k.parquet")
            assert (code, "calibrate anew" in err) == (1, True)


class TestCommand:
    def test_writes_a_calibration(self, files, tmp_path):
        out = tmp_path / "calibration.json"
        code, text, err = zscore("calibrate", *files, "--out", out)
        assert (code, err) == (0, "")
        assert text.splitlines()[-1] == f"written to {out}"
        made = read_calibration(str(out))
        assert list(made.fits) == list(z_reward().names)
        assert set(made.references) == {*z_reward().names, "overall"}
        assert made.provenance["rubric"] == {"name": "z-reward", "hash": z_reward().hash}
        assert made.provenance["settings"] == {"aggregate": "trimmed", "fit_share": 0.5, "seed": 0}

    def test_filter_keeps_what_the_calibration_says(self, files, tmp_path):
        out, kept = tmp_path / "calibration.json", tmp_path / "kept.parquet"
        assert zscore("calibrate", *files, "--out", out)[0] == 0
        call = ("filter", files[0], "--calibration", out, "--min", "realism=3", "--confidence", 0.7, "--out", kept)
        code, _, err = zscore(*call)
        assert (code, err) == (0, "")
        made = read_calibration(str(out))
        scores = apply_calibration(pl.read_parquet(files[0]).filter(pl.col("overall").is_not_null()), made)
        mask = select_confident(scores["realism"], made, 3.0, 0.7, "realism")
        assert 0 < mask.sum() < len(mask)
        assert pl.read_parquet(kept)["key"].to_list() == scores.filter(mask)["key"].to_list()

    def test_no_ratings(self, files, tmp_path):
        (tmp_path / "none.csv").write_text("key,score\n")
        code, text, _ = zscore("calibrate", files[0], tmp_path / "none.csv", "--out", tmp_path / "c.json")
        assert (code, "nothing written" in text) == (0, True)
        assert not (tmp_path / "c.json").exists()

    @pytest.mark.parametrize("victim", [0, 1])
    def test_it_never_writes_over_what_it_reads(self, files, tmp_path, victim):
        before = [path.read_bytes() for path in files]
        link = tmp_path / "link"
        link.symlink_to(files[victim])
        for target in (files[victim], link, tmp_path / "." / files[victim].name):
            code, out, err = zscore("calibrate", *files, "--out", target)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert "--out" in err
            assert [path.read_bytes() for path in files] == before

    def test_a_folder_is_no_output(self, files, tmp_path):
        code, _, err = zscore("calibrate", *files, "--out", tmp_path)
        assert (code, "is a folder" in err) == (2, True)

    def test_an_output_that_cannot_be_written(self, files, tmp_path):
        (tmp_path / "file").touch()
        code, _, err = zscore("calibrate", *files, "--out", tmp_path / "file" / "c.json")
        assert (code, "check that the folder exists" in err, "shards" in err) == (1, True, False)

    def test_ratings_on_another_scale_are_refused(self, files, tmp_path):
        table = pl.read_csv(files[1])
        far = tmp_path / "far.csv"
        table.with_columns(pl.col("score") * 20).write_csv(far)
        code, out, err = zscore("calibrate", files[0], far, "--out", tmp_path / "c.json")
        assert (code, out) == (1, "")
        count = f"{table.height:,} of the {table.height:,} ratings"
        assert f"{count} of {far} are outside the scale, 1 to 5: they go from 20 to 100; rescale" in err
        assert not (tmp_path / "c.json").exists()
        table.with_columns(pl.when(pl.int_range(pl.len()) == 7).then(0).otherwise("score").alias("score")).write_csv(
            far
        )
        assert f"1 of the {table.height:,} ratings" in zscore("calibrate", files[0], far)[2]

    def test_what_is_not_rated_in_the_rubric_may_have_any_scale(self, files, tmp_path):
        more = files[1].read_text() + "\ns-0000.tar,k00000,mood,0,95\n"
        (tmp_path / "more.csv").write_text(more)
        assert zscore("calibrate", files[0], tmp_path / "more.csv", "--out", tmp_path / "c.json")[0] == 0

    def test_a_known_scale_is_mapped_end_to_end(self, tmp_path):
        made = [row(i, means=1 + (i % 9) / 2, group=f"g{i}") for i in range(50)]
        entries = [
            {
                "image_path": f"{one.key}.webp",
                "prompt_id": one.group,
                "overall_rating": 1 + i % 7,
                "image_text_alignment_rating": 7 - i % 7,
                "fidelity_rating": 4,
            }
            for i, one in enumerate(made)
        ]
        (tmp_path / "m.json").write_text(json.dumps(entries))
        scores, out = write_scores(tmp_path / "s.parquet", made), tmp_path / "c.json"
        call = ("calibrate", scores, tmp_path / "m.json", "--format", "imagereward", "--fit-share", 0, "--out", out)
        code, text, _ = zscore(*call, "--map", "fidelity=realism")
        assert code == 0
        assert "ratings on 1 to 7, mapped to 1 to 5" in text
        references = read_calibration(str(out)).references
        assert set(references["realism"].human) == {3.0}
        assert sorted(set(references["overall"].human)) == pytest.approx([1 + 4 * k / 6 for k in range(7)])
        entries[0]["overall_rating"] = 8
        (tmp_path / "m.json").write_text(json.dumps(entries))
        assert "outside the scale, 1 to 7: they go from 1 to 8; rescale them to the rubric's levels" in zscore(*call)[2]

    @pytest.mark.parametrize("broken", [[float("nan")] * 9, None, [0.0] * 9, [-0.5, 1.5, *[0.0] * 7]])
    def test_rows_without_a_distribution_are_left_out_and_counted(self, files, tmp_path, broken):
        table = pl.read_parquet(files[0])
        first = table.with_row_index("n").filter(pl.col("status") == "ok")["n"][0]
        lists = table["realism_probs"].to_list()
        lists[first] = broken
        changed = table.with_columns(realism_probs=pl.Series(lists, dtype=table.schema["realism_probs"]))
        scores = rewrite(changed.to_arrow(), tmp_path / "broken.parquet")
        code, text, err = zscore("calibrate", scores, files[1], "--out", tmp_path / "c.json")
        assert (code, err) == (0, "")
        assert "realism: 1 rated samples left out" in text
        assert "alignment: 1" not in text
        made = read_calibration(str(tmp_path / "c.json"))
        ok = int((table["status"] == "ok").sum())
        assert made.fits["realism"].samples + len(made.references["realism"].score) == ok - 1
        assert zscore("eval", scores, files[1], "--json", "--bootstrap", 20)[0] == 0

    def test_tables_with_some_columns(self, files, tmp_path):
        part, out = tmp_path / "part.parquet", tmp_path / "c.json"

        def call(columns, human=files[1]):
            assert zscore("filter", files[0], "--columns", columns, "--out", part)[0] == 0
            return zscore("calibrate", part, human, "--out", out)

        assert call("shard,key,group,realism,realism_probs")[0] == 0
        assert set(read_calibration(str(out)).references) == {"realism"}
        assert call("shard,key,group,realism,realism_probs,overall")[0] == 0
        assert set(read_calibration(str(out)).references) == {"realism"}
        overall = tmp_path / "overall.csv"
        pl.read_csv(files[1]).with_columns(dimension=pl.lit("overall")).group_by(
            "shard", "key", "dimension", maintain_order=True
        ).agg(pl.col("score").mean()).write_csv(overall)
        assert call("shard,key,group,overall", overall)[0] == 0
        assert set(read_calibration(str(out)).references) == {"overall"}
        for columns, message in (
            ("key,realism,overall", "has no column 'shard'"),
            ("shard,key,overall", "has no column 'group'"),
            ("shard,index,key,group", "has no column with scores"),
        ):
            code, _, err = call(columns)
            assert (code, err.count("\n")) == (1, 1)
            assert message in err

    def test_an_overall_that_people_rated_wants_all_dimensions(self, files, tmp_path):
        table = pl.read_csv(files[1])
        overall = table.filter(pl.col("dimension") == "realism").with_columns(dimension=pl.lit("overall"))
        pl.concat([table, overall]).write_csv(tmp_path / "more.csv")
        part = tmp_path / "part.parquet"
        columns = "shard,key,group,overall,realism,realism_probs"
        assert zscore("filter", files[0], "--columns", columns, "--out", part)[0] == 0
        code, _, err = zscore("calibrate", part, tmp_path / "more.csv", "--out", tmp_path / "c.json")
        assert (code, "no column alignment, aesthetics, plausibility" in err) == (1, True)

    def test_wrong_calls_are_one_line(self, files, tmp_path):
        for arguments, code, message in (
            ((*files, "--fit-share", "2"), 2, "--fit-share 2"),
            ((*files, "--aggregate", "median"), 2, "none of trimmed, mean"),
            ((files[0], tmp_path / "gone.csv"), 1, "no such file"),
        ):
            found, out, err = zscore("calibrate", *arguments, "--out", tmp_path / "c.json")
            assert (found, out, err.count("\n")) == (code, "", 1)
            assert message in err
