"""Reading and aggregating human ratings, in every format."""

from __future__ import annotations

import json
import statistics

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zscore.errors import TableError, UsageError
from zscore.human import Ratings, aggregate, aggregation
from zscore.human_formats import FORMATS, key_of, read_human

DIMENSIONS = ["alignment", "realism", "overall"]


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows_of(ratings, *columns):
    return ratings.frame.select(columns).rows()


def rated(scores, **columns):
    """Ratings of one sample or, with lists in `columns`, of several."""
    frame = pl.DataFrame({"score": scores}).with_columns(
        key=pl.lit("k"), dimension=pl.lit("overall"), rater=pl.int_range(pl.len()).cast(pl.String)
    )
    frame = frame.with_columns(**{name: pl.Series(values) for name, values in columns.items()})
    return Ratings(frame.with_columns(pl.col("score").cast(pl.Float64)), relative=False, source="here")


class TestTables:
    def test_long_csv(self, tmp_path):
        path = write(tmp_path, "r.csv", "shard,key,dimension,rater,score\na,0001,alignment,x,4\na,0001,alignment,y,5\n")
        ratings = read_human(path, DIMENSIONS)
        assert rows_of(ratings, "shard", "key", "dimension", "rater", "score") == [
            ("a", "0001", "alignment", "x", 4.0),
            ("a", "0001", "alignment", "y", 5.0),
        ]
        assert not ratings.relative

    def test_keys_of_digits_stay_text(self, tmp_path):
        path = write(tmp_path, "r.csv", "key,score\n0001,4\n1,5\n")
        assert rows_of(read_human(path, DIMENSIONS), "key", "dimension") == [("0001", "overall"), ("1", "overall")]

    def test_wide_csv_with_empty_cells(self, tmp_path):
        path = write(tmp_path, "r.csv", "key,realism,alignment,colour\na,1,2,9\nb,,3.5,9\n")
        ratings = read_human(path, DIMENSIONS)
        assert sorted(rows_of(ratings, "key", "dimension", "score")) == [
            ("a", "alignment", 2.0),
            ("a", "realism", 1.0),
            ("b", "alignment", 3.5),
        ]

    def test_wide_csv_with_raters(self, tmp_path):
        path = write(tmp_path, "r.csv", "key,rater,realism\na,x,1\na,y,2\n")
        assert rows_of(read_human(path, DIMENSIONS), "rater", "score") == [("x", 1.0), ("y", 2.0)]

    def test_wide_parquet_with_lists(self, tmp_path):
        path = str(tmp_path / "r.parquet")
        pl.DataFrame({"key": ["a", "b"], "realism": [[1, 2, 3], [4]], "alignment": [5.0, None]}).write_parquet(path)
        ratings = read_human(path, DIMENSIONS)
        assert sorted(rows_of(ratings, "key", "dimension", "rater", "score"), key=str) == [
            ("a", "alignment", None, 5.0),
            ("a", "realism", "0", 1.0),
            ("a", "realism", "1", 2.0),
            ("a", "realism", "2", 3.0),
            ("b", "realism", "0", 4.0),
        ]

    def test_tsv_and_bom(self, tmp_path):
        path = write(tmp_path, "r.tsv", "\ufeffkey\tscore\na\t4\n")
        assert rows_of(read_human(path, DIMENSIONS), "key", "score") == [("a", 4.0)]

    def test_columns_under_other_names(self, tmp_path):
        path = write(tmp_path, "r.csv", "key,item,worker,answer\nrow1,a,x,4\n")
        ratings = read_human(path, DIMENSIONS, columns={"key": "item", "rater": "worker", "score": "answer"})
        assert rows_of(ratings, "key", "rater", "score") == [("a", "x", 4.0)]

    def test_dimensions_under_other_names(self, tmp_path):
        path = write(tmp_path, "r.csv", "key,photo\na,4\n")
        assert rows_of(read_human(path, DIMENSIONS, names={"photo": "realism"}), "dimension") == [("realism",)]

    def test_url(self):
        import fsspec

        fsspec.filesystem("memory").pipe_file("/human/r.csv", b"key,score\na,4\n")
        assert rows_of(read_human("memory://human/r.csv", DIMENSIONS), "key", "score") == [("a", 4.0)]

    def test_empty_file_of_ratings(self, tmp_path):
        path = write(tmp_path, "r.csv", "key,score\n")
        assert read_human(path, DIMENSIONS).frame.height == 0

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("score\n3\n", "no column 'key'"),
            ("key,photo\na,3\n", "neither a 'score' column"),
            ("key,score\na,3\nb,good\nc,bad\n", "2 rows whose score isn't a finite number; the first: key 'b'"),
            ("key,score\na,nan\n", "1 rows whose score isn't a finite number"),
            ("key,score\na,inf\n", "isn't a finite number"),
            ("key,score\n,3\n", "1 rows whose key is empty"),
            ("key,score\na,3\na,4\n", "1 ratings stand there more than once; the first: key 'a'.*--column rater=NAME"),
            ("key,rater,score\na,x,3\na,x,4\nb,x,1\nb,x,1\n", "2 ratings stand there more.*remove the duplicates"),
            ("shard,index,key,score\ns,one,a,3\n", "index isn't a whole number"),
            ("key,score\na\nb,3,4\n", "can't be read"),
            ("", "can't be read"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, text, message):
        with pytest.raises(TableError, match=message):
            read_human(write(tmp_path, "r.csv", text), DIMENSIONS)

    def test_missing_file(self, tmp_path):
        with pytest.raises(TableError, match="no such file"):
            read_human(str(tmp_path / "none.csv"), DIMENSIONS)

    def test_wrong_flags(self, tmp_path):
        path = write(tmp_path, "r.csv", "key,score\na,4\n")
        with pytest.raises(UsageError, match="'tables' is none of table, hpdv2"):
            read_human(path, DIMENSIONS, layout="tables")
        with pytest.raises(UsageError, match="the role is one of"):
            read_human(path, DIMENSIONS, columns={"name": "key"})
        with pytest.raises(TableError, match="did you mean 'score'"):
            read_human(path, DIMENSIONS, columns={"score": "scores"})
        with pytest.raises(UsageError, match="rates overall"):
            read_human(path, DIMENSIONS, names={"photo": "realism"})
        with pytest.raises(UsageError, match="leave it out with --format hpdv2"):
            read_human(path, DIMENSIONS, layout="hpdv2", columns={"key": "item"})


class TestFormats:
    def test_keys(self):
        assert key_of("images/train/a.b.webp") == "images/train/a"
        assert key_of("./x.jpg") == "x"
        assert key_of("v1.5/0001.png") == "v1.5/0001"

    def test_hpdv2_ranks(self, tmp_path):
        entry = {"prompt": "a cat", "image_path": ["00001.jpg", "00002.jpg", "00003.jpg"], "rank": [2, 1, 3]}
        ratings = read_human(write(tmp_path, "test.json", json.dumps([entry, entry])), DIMENSIONS, layout="hpdv2")
        assert ratings.relative
        assert rows_of(ratings, "key", "group", "score")[:4] == [
            ("00001", "0", -2.0),
            ("00002", "0", -1.0),
            ("00003", "0", -3.0),
            ("00001", "1", -2.0),
        ]

    def test_hpdv2_pairs(self, tmp_path):
        entry = {"prompt": "p", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1], "user_hash": "u"}
        ratings = read_human(write(tmp_path, "train.json", json.dumps([entry])), DIMENSIONS, layout="hpdv2")
        assert rows_of(ratings, "key", "score") == [("a", 0.0), ("b", 1.0)]

    @pytest.mark.parametrize("suffix", ["json", "parquet"])
    def test_image_reward(self, tmp_path, suffix):
        entry = {
            "image_path": "images/test/test_1/0a1b.webp",
            "prompt_id": "000864-0061",
            "prompt": "painting of a holy woman",
            "classification": "People",
            "image_amount_in_total": 9,
            "rank": 5,
            "overall_rating": 4,
            "image_text_alignment_rating": 3,
            "fidelity_rating": 7,
        }
        path = str(tmp_path / f"metadata.{suffix}")
        if suffix == "json":
            write(tmp_path, "metadata.json", json.dumps([entry]))
        else:
            pl.DataFrame([entry]).write_parquet(path)
        ratings = read_human(path, DIMENSIONS, layout="imagereward", names={"fidelity": "realism"})
        assert rows_of(ratings, "key", "group", "dimension", "score") == [
            ("images/test/test_1/0a1b", "000864-0061", "overall", 4.0),
            ("images/test/test_1/0a1b", "000864-0061", "alignment", 3.0),
            ("images/test/test_1/0a1b", "000864-0061", "realism", 7.0),
        ]

    def test_pick_a_pic(self, tmp_path):
        path = str(tmp_path / "validation.parquet")
        pl.DataFrame(
            {
                "are_different": [True, True, False, True],
                "caption": ["p", "p", "q", "q"],
                "ranking_id": [7, 8, 9, 10],
                "image_0_uid": ["u0", "u1", "u3", "u5"],
                "image_1_uid": ["u1", "u2", "u3", "u6"],
                "jpg_0": [b"", b"", b"", b""],
                "label_0": [1.0, 0.5, 0.5, None],
                "label_1": [0.0, 0.5, 0.5, None],
                "has_label": [True, True, True, False],
            }
        ).write_parquet(path)
        ratings = read_human(path, DIMENSIONS, layout="pickapic")
        assert ratings.relative
        assert rows_of(ratings, "key", "group", "score") == [
            ("u0", "7", 1.0),
            ("u1", "7", 0.0),
            ("u1", "8", 0.5),
            ("u2", "8", 0.5),
        ]

    def test_genai_bench(self, tmp_path):
        data = {"00000": {"id": "00000", "prompt": "p", "models": {"DALLE_3": [4, 5, 5], "SDXL_Base": [1, 2, 3]}}}
        path = write(tmp_path, "genai_image.json", json.dumps(data))
        ratings = read_human(path, DIMENSIONS, layout="genai-bench")
        assert rows_of(ratings, "key", "group", "dimension", "rater", "score")[2:4] == [
            ("DALLE_3/00000", "00000", "alignment", "2", 5.0),
            ("SDXL_Base/00000", "00000", "alignment", "0", 1.0),
        ]

    def test_agiqa(self, tmp_path):
        text = (
            "name,prompt,adj1,adj2,style,mos_quality,std_quality,mos_align,std_align\n"
            'AttnGAN_normal_000.jpg,"statue, of a man",,,,1.2,0.5,3.4,0.6\n'
        )
        ratings = read_human(write(tmp_path, "data.csv", text), DIMENSIONS, layout="agiqa-3k")
        assert rows_of(ratings, "key", "group", "dimension", "score") == [
            ("AttnGAN_normal_000", "statue, of a man", "quality", 1.2),
            ("AttnGAN_normal_000", "statue, of a man", "alignment", 3.4),
        ]

    def test_evalmuse(self, tmp_path):
        entry = {
            "prompt_id": "04922",
            "prompt": "p",
            "type": "synthetic",
            "img_path": "SDXL-Turbo/04922.png",
            "total_score": [4, 3, 5],
            "element_score": {"dog (animal)": [1, 1, 0]},
            "promt_meaningless": [0, 0, 0],
        }
        path = write(tmp_path, "train_list.json", json.dumps([entry]))
        ratings = read_human(path, DIMENSIONS, layout="evalmuse")
        assert rows_of(ratings, "key", "group", "rater", "score") == [
            ("SDXL-Turbo/04922", "04922", "0", 4.0),
            ("SDXL-Turbo/04922", "04922", "1", 3.0),
            ("SDXL-Turbo/04922", "04922", "2", 5.0),
        ]

    def test_tifa160(self, shared_data):
        path = shared_data / "tifa160-ratings" / "tifa160-likert-anns.csv"
        ratings = read_human(str(path), DIMENSIONS, layout="tifa160")
        table = aggregate(ratings, "trimmed")
        assert dict(table.group_by("raters").len().rows()) == {5: 796, 4: 3, 3: 1}
        assert table["group"].n_unique() == 160
        # Two pictures by hand: raters 3, 5, 5, 5, 4 lose 3 and a 5.
        first = table.filter(pl.col("key") == "mini-dalle/tifa160_143").row(0, named=True)
        assert first["ratings"] == [4, 5, 5]
        assert first["score"] == 4.666666667
        plain = aggregate(ratings, "mean").filter(pl.col("key") == "mini-dalle/tifa160_143")
        assert plain["score"][0] == 4.4

    def test_avt_ratings(self, shared_data):
        ratings = read_human(str(shared_data / "avt-ratings.csv"), DIMENSIONS)
        table = aggregate(ratings, "mean")
        assert table.height == 402
        assert set(table["raters"]) == {21, 22, 23}
        assert table.filter(pl.col("dimension") == "alignment").height == 134

    @pytest.mark.parametrize("layout", list(FORMATS))
    @pytest.mark.parametrize("text", ["", "{}", "[1]", "name,x\n1,2\n", '[{"image_path": ["a"], "rank": [1, 2]}]'])
    def test_other_files_are_refused_in_words(self, tmp_path, layout, text):
        path = write(tmp_path, "other.json", text)
        if (layout, text) == ("genai-bench", "{}"):  # no prompts is no error
            assert read_human(path, DIMENSIONS, layout=layout).frame.height == 0
            return
        with pytest.raises(TableError, match=r"other\.json"):
            read_human(path, DIMENSIONS, layout=layout)


class TestAggregation:
    @pytest.mark.parametrize(
        ("scores", "kept"),
        [([3], [3]), ([1, 5], [1, 5]), ([5, 1, 3], [3]), ([2, 2, 2, 2], [2, 2]), ([1, 5, 5, 4], [4, 5])],
    )
    def test_trimmed(self, scores, kept):
        table = aggregate(rated(scores), "trimmed")
        assert table["ratings"].to_list() == [kept]
        assert table["raters"].to_list() == [len(scores)]

    def test_order_of_ratings_does_not_matter(self):
        first = aggregate(rated([0.1, 0.2, 0.3, 0.7]), "mean")["score"][0]
        second = aggregate(rated([0.7, 0.3, 0.2, 0.1]), "mean")["score"][0]
        assert first == second

    def test_unknown_rule(self):
        with pytest.raises(UsageError, match="none of trimmed, mean"):
            aggregation("median")
        assert aggregation("mean") == "mean"

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(2, 10)), min_size=1, max_size=40))
    def test_like_plain_python(self, pairs):
        samples = [name for name, _ in pairs]
        ratings = rated([score / 2 for _, score in pairs], key=samples)
        for how in ("trimmed", "mean"):
            table = aggregate(ratings, how)
            assert table["key"].to_list() == sorted(set(samples))
            for name, found in table.select("key", "score").rows():
                scores = sorted(score / 2 for sample, score in pairs if sample == name)
                if how == "trimmed" and len(scores) > 2:
                    scores = scores[1:-1]
                assert found == round(statistics.fmean(scores), 9)
