from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import zscore
from tests.tiny import png, write_rubric, write_tar
from zscore import Failure, Scorer
from zscore.demo.student import untrained_student
from zscore.errors import ModelError, RubricError, SampleError, UsageError


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    rubric = write_rubric(tmp_path_factory.mktemp("rubric"))
    with Scorer(untrained_student(), engine="transformers", rubric=str(rubric), max_pixels=4096) as made:
        yield made


@pytest.fixture
def picture():
    return Image.open(io.BytesIO(png(1))).convert("RGB")


def test_all_kinds_of_pictures_are_the_same_picture(scorer, picture, tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(png(1))
    kinds = [picture, np.asarray(picture), png(1), bytearray(png(1)), str(path), path]
    scores = [scorer.score([("a cat", kind)])[0] for kind in kinds]
    for score in scores:
        assert (score["left"].probs == scores[0]["left"].probs).all()
    assert list(scores[0].dimensions) == ["left", "right"]


def test_a_score_is_a_distribution_with_its_summary(scorer, picture):
    (score,) = scorer.score([("a cat", picture)])
    left = score["left"]
    assert left.values == (1.0, 2.0, 4.0)
    assert left.probs.sum() == pytest.approx(1, abs=1e-6)
    assert left.mean == pytest.approx(float(left.probs @ np.array(left.values)), abs=1e-5)
    assert left.std > 0
    assert left.entropy > 0
    assert left.at_least(2.0) == pytest.approx(float(left.probs[1:].sum()), abs=1e-6)
    assert left.at_least(0.0) == pytest.approx(1, abs=1e-6)
    assert left.at_least(4.5) == 0.0
    assert score.overall == pytest.approx((left.mean + score["right"].mean) / 2, abs=1e-6)


def test_order_is_kept_over_many_batches(scorer):
    pairs = [(f"prompt {n}", png(n)) for n in range(11)]
    together = scorer.score(pairs)
    alone = [scorer.score([pair])[0] for pair in pairs]
    for a, b in zip(together, alone, strict=True):
        assert a["left"].probs == pytest.approx(b["left"].probs, abs=1e-5)
    assert len({score["left"].mean for score in together}) > 5
    assert scorer.score([]) == []


def test_prompt_and_picture_both_matter(scorer, picture):
    a, b = scorer.score([("a cat", picture), ("something else entirely", picture)])
    assert (a["left"].probs != b["left"].probs).any()


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (("a", b"nothing"), "bad_image"),
        (("a", "no/such/file.png"), "missing_image: can't read no/such/file.png"),
        (("word " * 20_000, png(1)), "prompt_too_long"),
        (("half \ud83e", png(1)), "bad_text: the prompt has half of a surrogate pair"),
        ((3, png(1)), "bad_text: the prompt is a int"),
        (("a", np.zeros((4, 4))), "bad_image"),
    ],
)
def test_one_bad_pair_raises_or_comes_back_as_a_failure(scorer, pair, says):
    good = ("a cat", png(1))
    with pytest.raises(SampleError, match=f"pair 1: {says}"):
        scorer.score([good, pair, good])
    first, failure, last = scorer.score([good, pair, good], on_error="return")
    assert isinstance(failure, Failure)
    assert says.split(":")[0] == failure.status
    assert (first["left"].probs == last["left"].probs).all()


def test_a_call_that_was_cut_off_doesn_t_disturb_the_next(scorer, monkeypatch):
    good = ("a cat", png(1))
    before = scorer.score([good])[0]["left"].probs
    step = type(scorer._engine).step

    def interrupted(self):
        monkeypatch.setattr(type(scorer._engine), "step", step)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(scorer._engine), "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scorer.score([("other", png(5))] * 3)
    assert scorer.score([good])[0]["left"].probs == pytest.approx(before, abs=1e-5)


def test_wrong_use_is_told_at_once(tmp_path, scorer):
    with pytest.raises(UsageError, match="unexpected keyword argument 'layuot'"):
        Scorer(untrained_student(), layuot="joint")
    with pytest.raises(UsageError, match="--layout 'both' isn't known"):
        Scorer(untrained_student(), layout="both", engine="transformers")
    with pytest.raises(UsageError, match="--engine 'onnx' isn't known"):
        Scorer(untrained_student(), engine="onnx")
    with pytest.raises(UsageError, match="--max-pixels 100: at least 1024"):
        Scorer(untrained_student(), engine="transformers", max_pixels=100)
    with pytest.raises(RubricError, match="no rubric is called 'zreward'.*z-reward"):
        Scorer(untrained_student(), rubric="zreward")
    with pytest.raises(ModelError, match="no model folder at"):
        Scorer(tmp_path / "none")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        Scorer(tmp_path)
    with pytest.raises(UsageError, match="on_error='ignore'"):
        scorer.score([], on_error="ignore")


def test_weights_of_another_shape_are_a_model_error(tmp_path):
    import shutil

    shutil.copytree(untrained_student(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(ModelError, match="transformers can't load"):
        Scorer(tmp_path / "m", engine="transformers")


def test_the_demo_student_comes_with_a_warning():
    with pytest.warns(UserWarning, match="NO MODEL GIVEN"), Scorer(engine="transformers"):
        pass


def test_a_closed_scorer_says_so(tmp_path, picture):
    rubric = write_rubric(tmp_path)
    scorer = Scorer(untrained_student(), engine="transformers", rubric=str(rubric))
    scorer.close()
    scorer.close()
    with pytest.raises(UsageError, match="closed"):
        scorer.score([("a", picture)])


def test_public_names():
    assert zscore.__all__ == ["Failure", "LevelDistribution", "Score", "Scorer", "ZscoreError"]
    for name in zscore.__all__:
        assert getattr(zscore, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        zscore.Nothing  # noqa: B018


def test_scorer_and_cli_agree(scorer, tmp_path):
    import pyarrow.parquet as pq

    from zscore.progress import QuietReporter
    from zscore.score import ScoreOptions, score

    write_tar(tmp_path / "in.tar", [("a.png", png(3)), ("a.txt", b"a dog")])
    out = str(tmp_path / "s.parquet")
    score(ScoreOptions(inputs=(str(tmp_path / "in.tar"),), out=out, workers=0), scorer._judge, QuietReporter())
    (row,) = pq.read_table(out).to_pylist()
    (direct,) = scorer.score([("a dog", png(3))])
    assert row["left_probs"] == pytest.approx(direct["left"].probs.tolist(), abs=1e-6)
