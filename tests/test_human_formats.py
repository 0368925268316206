"""Every benchmark's file, from the file to the metrics, beside scores whose keys are those that shards of it have."""

from __future__ import annotations

import itertools
import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.command import zscore
from tests.scores_factory import row, write_scores
from tests.tars import FUZZ
from zscore.human import aggregate
from zscore.human_formats import FORMATS, key_of, read_human
from zscore.samples import split_name

PROMPTS, PICTURES = 6, 4
# What people think of picture `p` of prompt `g`: 1 to 4, another order for every prompt.
LIKED = {(g, p): 1 + (p + g) % PICTURES for g in range(PROMPTS) for p in range(PICTURES)}


def hpdv2():
    entries = []
    for g in range(PROMPTS):
        ranks = [1 + PICTURES - LIKED[g, p] for p in range(PICTURES)]
        entries.append({"prompt": f"p{g}", "image_path": [f"{g}_{p}.jpg" for p in range(PICTURES)], "rank": ranks})
    return json.dumps(entries), "{g}_{p}"


def imagereward():
    entries = [
        {
            "image_path": f"images/test/test_1/{g}-{p}.webp",
            "prompt_id": f"{g:06d}-0001",
            "prompt": f"p{g}",
            "classification": "People",
            "image_amount_in_total": PICTURES,
            "rank": 1 + PICTURES - liked,
            "overall_rating": liked + 2,
            "image_text_alignment_rating": liked + 1,
            "fidelity_rating": liked,
        }
        for (g, p), liked in LIKED.items()
    ]
    return json.dumps(entries), "{g}-{p}"


def pickapic():
    lines = ["ranking_id,caption,image_0_uid,image_1_uid,label_0,label_1"]
    for number, (g, (p, q)) in enumerate(itertools.product(range(PROMPTS), itertools.combinations(range(PICTURES), 2))):
        better = LIKED[g, p] > LIKED[g, q]
        lines.append(f"{number},p{g},uid-{g}-{p},uid-{g}-{q},{float(better)},{float(not better)}")
    return "\n".join(lines), "uid-{g}-{p}"


def genai_bench():
    prompts = {
        f"{g:05d}": {"prompt": f"p{g}", "models": {f"M{p}": [LIKED[g, p], LIKED[g, p] + 1] for p in range(PICTURES)}}
        for g in range(PROMPTS)
    }
    return json.dumps(prompts), "M{p}/{g:05d}"


def agiqa():
    lines = ["name,prompt,adj1,adj2,style,mos_quality,std_quality,mos_align,std_align"]
    lines += [f"M{p}_normal_{g:03d}.jpg,p{g},,,,{liked / 2},0.1,{liked},0.2" for (g, p), liked in LIKED.items()]
    return "\n".join(lines), "M{p}_normal_{g:03d}"


def evalmuse():
    entries = [
        {
            "prompt_id": f"{g:05d}",
            "prompt": f"p{g}",
            "type": "real",
            "img_path": f"M{p}/{g:05d}.png",
            "total_score": [liked, liked, liked + 1],
            "element_score": {"cat (animal)": [1, 1, 1]},
            "promt_meaningless": [0, 0, 0],
            "split_confidence": [1, 1, 1],
            "attribute_confidence": [1, 1, 1],
            "fidelity_label": [[], [], []],
        }
        for (g, p), liked in LIKED.items()
    ]
    return json.dumps(entries), "M{p}/{g:05d}"


def tifa160():
    lines = ["dsg_prompt_split,t2i_model,item_id,source_id,worker_id,question,answer"]
    for (g, p), liked in LIKED.items():
        lines += [f"tifa160,m{p},tifa160_{g},coco_{g},{worker},How?,{liked}" for worker in range(5)]
    return "\n".join(lines), "m{p}/tifa160_{g}"


FILES = {
    "hpdv2": ("test.json", hpdv2),
    "imagereward": ("metadata-test.json", imagereward),
    "pickapic": ("test.csv", pickapic),
    "genai-bench": ("genai_image.json", genai_bench),
    "agiqa-3k": ("data.csv", agiqa),
    "evalmuse": ("train_list.json", evalmuse),
    "tifa160": ("tifa160-likert-anns.csv", tifa160),
}


def test_every_format_is_here():
    assert list(FILES) == list(FORMATS)


@pytest.fixture(params=list(FILES))
def case(request, tmp_path):
    """Format, its file, and scores that order the pictures of every prompt as people do, but for one swapped pair."""
    name, make = FILES[request.param]
    text, key = make()
    (tmp_path / name).write_text(text)
    rows = []
    for number, ((g, p), liked) in enumerate(LIKED.items()):
        mean = {1: 2, 2: 1}.get(liked, liked) if g == 0 else liked
        named = {"key": key.format(g=g, p=p), "group": f"g{g}", "shard": f"{p}.tar"}
        rows.append(row(number, means=1 + mean / 2, **named))
    return request.param, tmp_path / name, write_scores(tmp_path / "scores.parquet", rows)


def test_from_the_file_to_the_accuracy(case):
    layout, human, scores = case
    code, out, err = zscore("eval", scores, human, "--format", layout, "--json", "--bootstrap", 50)
    assert (code, err) == (0, "")
    report = json.loads(out)["scores"]
    assert (report["missing"], report["unscored"]) == (0, 0)
    for one in report["dimensions"]:
        # 6 prompts × 6 pairs, one of them the other way round.
        assert one["pairs"] == 36
        assert one["metrics"]["hpa"]["value"] == pytest.approx(35 / 36)
    is_relative = layout in {"hpdv2", "pickapic"}
    assert (report["dimensions"][0]["metrics"]["srcc"]["value"] is None) is is_relative


def test_a_missing_picture_is_missed(case, tmp_path):
    layout, human, scores = case
    kept = tmp_path / "fewer.parquet"
    rows = pl.read_parquet(scores)
    assert rows.height == len(LIKED)
    write_scores(kept, [row(0, key=rows["key"][0], shard="0.tar", group="g0")])
    code, _, err = zscore("eval", kept, human, "--format", layout)
    assert code == 1
    assert "aren't in the scores" in err
    code, out, err = zscore("eval", kept, human, "--format", layout, "--allow-missing", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["scores"]["missing"] > 0


def test_calibration_wants_a_scale(case, tmp_path):
    layout, human, scores = case
    code, _, err = zscore("calibrate", scores, human, "--format", layout, "--out", tmp_path / "c.json")
    if layout in {"hpdv2", "pickapic"}:
        assert (code, "have no scale" in err) == (1, True)
    else:
        assert (code, err) == (0, "")
        assert (tmp_path / "c.json").exists()


def test_other_dimensions_are_named_and_can_be_mapped(case):
    layout, human, scores = case
    theirs = {"agiqa-3k": "quality", "imagereward": "fidelity"}.get(layout)
    if theirs is None:
        return
    code, out, _ = zscore("eval", scores, human, "--format", layout, "--bootstrap", 20)
    assert code == 0
    assert f"not compared: {theirs} (no such dimension in the scores; --map {theirs}=…)" in out
    call = ("eval", scores, human, "--format", layout, "--map", f"{theirs}=realism", "--json", "--bootstrap", 20)
    code, out, _ = zscore(*call)
    assert code == 0
    assert "realism" in {one["dimension"] for one in json.loads(out)["scores"]["dimensions"]}


@FUZZ
@given(st.text(alphabet="ab./_-é", min_size=1, max_size=12))
def test_keys_are_webdatasets(name):
    """A picture packed under its path gets, as its key, what the reader of ratings makes of that path."""
    split = split_name(name)
    if split is not None and not name.startswith("./"):
        assert key_of(name) == split[0]


scores_of = st.lists(
    st.tuples(st.sampled_from(["k1", "k2", "k3"]), st.sampled_from(["alignment", "realism"]), st.integers(0, 3)),
    min_size=1,
    unique=True,
)


@FUZZ
@given(scores_of, st.integers(0, 100))
def test_long_and_wide_say_the_same(tmp_path_factory, drawn, seed):
    """The same ratings as a long CSV, a wide CSV, a long parquet, and lists in parquet."""
    folder = tmp_path_factory.mktemp("same")
    random = np.random.default_rng(seed)
    long = pl.DataFrame(drawn, schema=["key", "dimension", "rater"], orient="row").with_columns(
        score=pl.Series(random.integers(2, 11, len(drawn)) / 2)
    )
    long.write_csv(folder / "long.csv")
    long.write_parquet(folder / "long.parquet")
    long.pivot("dimension", index=["key", "rater"], values="score").write_csv(folder / "wide.csv")
    lists = (
        long.group_by("key", "dimension").agg(pl.col("score").sort()).pivot("dimension", index="key", values="score")
    )
    lists.write_parquet(folder / "lists.parquet")
    tables = []
    for name in ("long.csv", "long.parquet", "wide.csv", "lists.parquet"):
        ratings = read_human(str(folder / name), ["alignment", "realism", "overall"])
        tables.append(aggregate(ratings, "trimmed").select("key", "dimension", "score", "ratings", "raters"))
    for table in tables[1:]:
        assert table.equals(tables[0])
