"""Ratings to annotations: against loops, and on the real ratings."""

from __future__ import annotations

import itertools
import statistics

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tars import END, member
from zscore.errors import TableError, UsageError
from zscore.human import Ratings, read_table
from zscore.rubrics.rubric import load_rubric
from zscore.samples import ReadOptions
from zscore.shards import expand
from zscore_trainers.annotations import BuildOptions, build, check_raters, write

LEVELS = load_rubric("z-reward").values
OPTIONS = BuildOptions(values=LEVELS, min_agreement=-1)


def ratings(rows):
    kinds = {"key": pl.String, "dimension": pl.String, "rater": pl.String, "score": pl.Float64}
    return Ratings(pl.DataFrame(rows, schema=kinds, orient="row", strict=False), False, "ratings.csv")


def shard(folder, prompts):
    """A shard with a sample k0, k1, … for each prompt."""
    data = b"".join(
        member(f"k{number}.png", b"x") + member(f"k{number}.txt", prompt.encode())
        for number, prompt in enumerate(prompts)
    )
    (folder / "a.tar").write_bytes(data + END)
    return expand([str(folder / "a.tar")])


def by_hand(scores):
    """Trimmed mean to the nearest half-point, the higher of two."""
    kept = sorted(scores)[1:-1] if len(scores) > 2 else scores
    mean = statistics.fmean(kept)
    return min(LEVELS, key=lambda level: (round(abs(level - mean), 9), -level))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from(LEVELS), min_size=1, max_size=5), min_size=2, max_size=5), st.data())
def test_labels_and_pairs_against_loops(tmp_path_factory, drawn, data):
    prompts = [data.draw(st.sampled_from(["one", "two"])) for _ in drawn]
    rows = [(f"k{n}", "realism", f"r{r}", score) for n, scores in enumerate(drawn) for r, score in enumerate(scores)]
    made = build(ratings(rows), shard(tmp_path_factory.mktemp("s"), prompts), OPTIONS)
    labels = [by_hand(scores) for scores in drawn]
    assert made.samples["realism"].to_list() == labels
    wanted = {
        (one, other): labels[one] - labels[other]
        for one, other in itertools.permutations(range(len(drawn)), 2)
        if prompts[one] == prompts[other] and labels[one] > labels[other]
    }
    assert {(row["winner"], row["loser"]): row["gap"] for row in made.pairs.iter_rows(named=True)} == wanted


def test_a_rater_who_disagrees_is_left_out_and_named(tmp_path):
    truth = [1.0, 2.0, 3.0, 4.0, 5.0, 1.5, 2.5, 3.5]
    rows = [(f"k{n}", "realism", rater, score) for rater in ("ann", "bo", "cy") for n, score in enumerate(truth)]
    rows += [(f"k{n}", "realism", "dee", 6 - score) for n, score in enumerate(truth)]
    rows += [("k0", "realism", "few", truth[0])]
    raters = {rater.name: rater for rater in check_raters(ratings(rows), 0.5)}
    assert [name for name, rater in raters.items() if not rater.kept] == ["dee"]
    assert raters["dee"].agreement == pytest.approx(-1)
    assert raters["few"].agreement is None
    made = build(
        ratings(rows), shard(tmp_path, [f"p{n}" for n in range(8)]), BuildOptions(values=LEVELS, min_agreement=0.5)
    )
    assert made.samples["realism"].to_list()[1:] == truth[1:]
    with pytest.raises(TableError, match="no rater reaches --min-agreement 1"):
        build(
            ratings([row for row in rows if row[2] in {"dee", "ann"}]), [], BuildOptions(values=LEVELS, min_agreement=1)
        )


def test_ratings_without_raters_are_all_kept(tmp_path):
    rows = [("k0", "realism", None, 4.0), ("k0", "realism", None, 3.0), ("k1", "realism", None, 2.0)]
    made = build(ratings(rows), shard(tmp_path, ["a", "a"]), BuildOptions(values=LEVELS, min_agreement=0.5))
    assert made.samples["realism"].to_list() == [3.5, 2.0]
    assert made.raters == ()


def test_some_ratings_without_raters(tmp_path):
    rows = [("k0", "realism", "anna", 4.0), ("k1", "realism", None, 2.0)]
    with pytest.raises(TableError, match=r"^ratings\.csv: 1 of 2 ratings name no rater: name all$"):
        build(ratings(rows), shard(tmp_path, ["a", "a"]), OPTIONS)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], r"^ratings\.csv holds no ratings$"),
        (
            [("k0", "realism", "r", 3.0), ("k0", "beauty", "r", 3.0)],
            r"1 ratings of other dimensions, such as 'beauty'; the",
        ),
        (
            [("k0", "realism", "r", 3.0), ("k0", "realism", "s", 7.0)],
            r"1 scores beyond .* of 1 to 5, such as 7 on realism",
        ),
        ([("k0", "realism", "r", 0.5)], "such as 0.5 on realism: give ratings on that scale"),
    ],
)
def test_ratings_that_arent_the_rubric_s(tmp_path, rows, said):
    with pytest.raises(TableError, match=said):
        build(
            ratings(rows), shard(tmp_path, ["a"]), BuildOptions(values=LEVELS, dimensions=load_rubric("z-reward").names)
        )


def test_an_out_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    made = build(ratings([("k0", "realism", "r", 3.0)]), shard(tmp_path, ["a"]), OPTIONS)
    with pytest.raises(UsageError, match=r"^--out .*out can't be made a folder: File exists: give another$"):
        write(made, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_prompt_is_in_one_split_whatever_the_shards(tmp_path):
    prompts = [f"prompt {n // 2}" for n in range(200)]
    rows = [(f"k{n}", "realism", "r", 3.0 + n % 2) for n in range(200)]
    options = BuildOptions(values=LEVELS, test_share=0.25)
    made = build(ratings(rows), shard(tmp_path, prompts), options).samples
    splits = made.group_by("prompt").agg(pl.col("split").n_unique(), pl.col("split").first().alias("which"))
    assert splits["split"].max() == 1
    assert 10 <= (splits["which"] == "test").sum() <= 40
    (tmp_path / "some").mkdir()
    again = build(ratings(rows[:20]), shard(tmp_path / "some", prompts[:20]), options).samples
    assert again["split"].to_list() == made["split"].to_list()[:20]


def test_samples_that_the_shards_lack_are_counted(tmp_path):
    rows = [(f"k{n}", "realism", "r", 3.0) for n in range(5)]
    made = build(ratings(rows), shard(tmp_path, ["a", "b"]), OPTIONS)
    assert (made.samples.height, made.unmatched) == (2, 3)
    with pytest.raises(TableError, match="none of the 1 rated samples is in the shards"):
        build(ratings([("x", "realism", "r", 3.0)]), shard(tmp_path, ["a"]), OPTIONS)


def test_a_key_in_two_shards(tmp_path):
    """Nobody can tell which of the two was rated; others in these shards do no harm."""
    for name in "ab":
        (tmp_path / name).mkdir()
        shard(tmp_path / name, ["one", "two"])
    both = expand([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(TableError) as raised:
        build(ratings([("k1", "realism", "r", 3.0)]), both, OPTIONS)
    a, b = (one.name for one in both)
    said = f"ratings.csv: key 'k1' is of sample 1 of {a} and sample 1 of {b}: name the samples in the ratings by shard"
    assert said in str(raised.value)
    named = pl.DataFrame({"shard": [a, b], "index": [1, 1], "dimension": "realism", "rater": "r", "score": [2.0, 4.0]})
    made = build(Ratings(named, False, "ratings.csv"), both, OPTIONS)
    assert made.samples["realism"].to_list() == [2.0, 4.0]


def test_shards_of_which_nothing_can_be_read(tmp_path):
    """A prompt elsewhere in the sample is read where one says so."""
    data = member("k0.png", b"x") + member("k0.json", b'{"text": "a dog"}')
    (tmp_path / "a.tar").write_bytes(data + END)
    found, rows = expand([str(tmp_path / "a.tar")]), ratings([("k0", "realism", "r", 3.0)])
    with pytest.raises(TableError, match=r"^none of the 1 samples .*; 'k0' of a\.tar: .*json:prompt.*--prompt-keys"):
        build(rows, found, OPTIONS)
    options = BuildOptions(values=LEVELS, min_agreement=-1, read=ReadOptions(prompt_keys="json:text"))
    assert build(rows, found, options).samples["prompt"].to_list() == ["a dog"]


@pytest.mark.parametrize(("name", "value"), [("test_share", 1.0), ("test_share", -0.1), ("min_agreement", 2.0)])
def test_options_that_are_none(name, value):
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        BuildOptions(values=LEVELS, **{name: value})


def test_real_ratings(shared_data, tmp_path):
    """134 pictures of five models on 27 prompts, by their raters."""
    rubric = load_rubric("z-reward")
    rated = read_table(str(shared_data / "avt-ratings.csv"), {"group": "prompt_id"}, rubric.names)
    made = build(rated, expand([str(shared_data / "avt-shards")]), OPTIONS)
    assert made.samples.height == 134
    assert made.unmatched == 0
    label = made.samples.filter(pl.col("key") == "craiyon_p01")["alignment"].item()
    scores = rated.frame.filter((pl.col("key") == "craiyon_p01") & (pl.col("dimension") == "alignment"))["score"]
    assert label == by_hand(scores.to_list())
    assert made.pairs.height > 100
    assert made.pairs["gap"].min() > 0
    prompts = made.samples["prompt"].to_list()
    assert all(prompts[row["winner"]] == prompts[row["loser"]] for row in made.pairs.iter_rows(named=True))
    write(made, tmp_path / "out")
    assert pl.read_parquet(tmp_path / "out" / "annotations.parquet").equals(made.samples)
