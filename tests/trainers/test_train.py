"""`zscore train` from end to end on the rubric world, and what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from contextlib import closing

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from tests.scores_factory import row, write_scores
from tests.tiny import write_tar
from tests.trainers import world_set
from zscore.cli.app import build_app
from zscore.errors import EngineError, ModelError, TableError, UsageError
from zscore.rubrics.rubric import load_rubric
from zscore.samples import ReadOptions, read_samples
from zscore.scorer import Scorer
from zscore.shards import expand
from zscore_trainers import engine as engine_module
from zscore_trainers.annotations import BuildOptions, build, write
from zscore_trainers.data import TrainSet
from zscore_trainers.held_out import HeldOut, is_held_out
from zscore_trainers.pictures import collect
from zscore_trainers.recipes import RECIPES, load_recipe, settings
from zscore_trainers.run_files import RunLock
from zscore_trainers.targets import read_targets
from zscore_trainers.train import TrainOptions, check, train
from zscore_trainers.world.shards import WorldOptions, write_world

RUBRIC = world_set.RUBRIC
FAST = ("steps=4", "batch_size=4", "micro_batch=4", "save_every=2", "evaluate_every=2", "held_out=0.3", "warmup=1")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, annotations and a body."""
    from zscore.human import read_table

    root = tmp_path_factory.mktemp("train")
    write_world(root / "world", WorldOptions(prompts=8, candidates=2, raters=3))
    ratings = read_table(str(root / "world" / "ratings.csv"), {}, RUBRIC.names)
    options = BuildOptions(values=RUBRIC.values, min_agreement=-1, test_share=0.0)
    write(build(ratings, expand([str(root / "world")]), options), root / "annotated")
    world_set.body(root / "body")
    return root


def options(world, out, **changes):
    chosen = {
        "algorithm": "sft",
        "data": str(world / "annotated" / "annotations.parquet"),
        "shards": (str(world / "world"),),
        "model": str(world / "body"),
        "out": out,
    }
    return TrainOptions(**(chosen | changes))


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """A short run: its folder, what it returned, what it logged."""
    out, steps = tmp_path_factory.mktemp("run"), []
    trained = train(options(world, out / "run"), load_recipe("tiny", FAST), lambda _, found: steps.append(found))
    return out / "run", trained, steps


class TestRun:
    def test_it_trains_on_some_prompts_and_evaluates_on_others(self, made):
        _, trained, steps = made
        assert trained.steps == len(steps) == 4
        assert trained.samples + trained.held_out == 16
        assert trained.held_out > 0
        assert trained.left_out == {}
        assert [any(name.startswith("hpa") for name in found) for found in steps] == [False, True, False, True]
        assert set(trained.metrics) >= {"plcc_realism", "plcc_overall", "hpa_overall"}

    @pytest.mark.parametrize(
        ("engine", "dtype", "apart"),
        [("transformers", "float32", 1e-4), pytest.param("vllm", "bfloat16", 2e-2, marks=pytest.mark.vllm)],
    )
    def test_the_result_is_served_at_once_with_the_scores_that_training_saw(self, made, tmp_path, engine, dtype, apart):
        """Both engines read the checkpoint as it was exported; vLLM computes in bfloat16."""
        _, trained, _ = made
        about = json.loads((trained.model / "zscore.json").read_text())
        assert (about["rubric"], about["layout"], about["max_pixels"]) == ("shapes", "joint", 9216)
        assert "sft on" in about["trained"]
        assert json.loads((trained.model / "config.json").read_text())["dtype"] == "bfloat16"
        train_set = world_set.world_set(tmp_path / "again", prompts=8)
        collate = world_set.collator(train_set, tmp_path / "again", trained.model)
        policy = world_set.load(trained.model)
        with torch.no_grad():
            wanted = policy(collate(range(3))[0], with_logprobs=False).score_logits_BDK.softmax(-1).numpy()
        from PIL import Image

        pictures = []
        for index in range(3):
            place = train_set.places[index]
            data = (tmp_path / "again" / "pictures.bin").read_bytes()[place.start : place.start + place.size]
            pictures.append((train_set.samples[index].prompt, Image.open(io.BytesIO(data))))
        collate.pictures.close()
        with Scorer(str(trained.model), engine=engine, dtype=dtype) as scorer:
            found = scorer.score(pictures)
        for mine, theirs in zip(found, wanted, strict=True):
            probs = np.stack([mine[name].probs for name in RUBRIC.names])
            np.testing.assert_allclose(probs, theirs, atol=apart)

    def test_a_second_run_into_the_folder_is_refused_but_for_resume(self, made, world):
        out, _, _ = made
        with pytest.raises(UsageError, match="holds a run already: give --resume"):
            train(options(world, out), load_recipe("tiny", FAST))
        said = r"was made with clip = 1\.0, now it is 0\.5; mass = 0\.05, now it is 0\.1: give the same"
        with pytest.raises(UsageError, match=said):
            train(options(world, out, resume=True), load_recipe("tiny", (*FAST, "mass=0.1", "clip=0.5")))
        assert train(options(world, out, resume=True), load_recipe("tiny", FAST)).steps == 4

    def test_a_teacher_s_scores_are_distilled(self, world, tmp_path):
        teacher = tmp_path / "teacher.parquet"
        known = [
            {"shard": one.shard, "key": one.key, "prompt": one.prompt, "group": one.group}
            for shard in expand([str(world / "world")])
            for one in read_samples(shard)
        ]
        rows = [row(index, **known[index]) for index in range(16)]
        rows[3] = row(3, **known[3], status="bad_image")
        write_scores(teacher, rows, rubric=RUBRIC)
        made = train(
            options(world, tmp_path / "run", algorithm="risd", data=str(teacher)),
            load_recipe("tiny", (*FAST, "steps=1")),
        )
        assert made.samples + made.held_out == 15
        assert made.left_out == {"have no scores (bad_image)": 1}

    def test_no_picture_has_a_label_on_every_dimension(self, world, tmp_path):
        """All of them are trained and evaluated on, each on what it has."""
        table = pl.read_parquet(world / "annotated" / "annotations.parquet").with_row_index("row")
        first = pl.col("row") % 2 == 0
        lacking = [
            pl.when(first if number % 2 else ~first).then(name).alias(name) for number, name in enumerate(RUBRIC.names)
        ]
        table.with_columns(lacking).drop("row").write_parquet(tmp_path / "a.parquet")
        recipe = load_recipe("tiny", (*FAST, "steps=2"))
        made = train(options(world, tmp_path / "run", data=str(tmp_path / "a.parquet")), recipe)
        assert made.samples + made.held_out == 16
        assert made.left_out == {f"have no label on {name}, only on others": 8 for name in RUBRIC.names}
        assert np.isfinite(made.metrics["plcc_overall"])
        logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert all(np.isfinite(row["loss"]) for row in logged)


class TestResume:
    @pytest.mark.parametrize(
        ("name", "error", "said"),
        [
            ("prompts", TableError, "has the prompt '.*', in the shards '.*!'"),
            ("pictures", UsageError, "was made with pictures = "),
        ],
    )
    def test_other_shards_of_the_same_names_are_refused(self, world, tmp_path, name, error, said):
        """The same samples with another prompt, which the table knows, or with other bytes of a picture."""
        recipe = load_recipe("tiny", (*FAST, "steps=1", "held_out=0"))
        begun = options(world, tmp_path / "run")
        train(begun, recipe)
        (tmp_path / "other").mkdir()
        ends, change = (".json", spoken_louder) if name == "prompts" else (".png", lambda data: data + b" ")
        for shard in (world / "world").glob("*.tar"):
            rewrite(shard, tmp_path / "other" / shard.name, ends, change)
        other = dataclasses.replace(begun, shards=(str(tmp_path / "other"),), resume=True)
        with pytest.raises(error, match=said):
            train(other, recipe)
        assert train(dataclasses.replace(begun, resume=True), recipe).steps == 1


def spoken_louder(data):
    """Metadata with another prompt."""
    found = json.loads(data)
    return json.dumps(found | {"prompt": found["prompt"] + "!"}).encode()


def rewrite(shard, to, ends, change, *, rename=False):
    """A copy of a shard with some of its members changed, or all of other names."""
    with tarfile.open(shard) as old, tarfile.open(to, "w") as new:
        for member in old.getmembers():
            data = old.extractfile(member).read()
            data = change(data) if member.name.endswith(ends) else data
            member.size = len(data)
            member.name = member.name.replace("p", "q", 1) if rename else member.name
            new.addfile(member, io.BytesIO(data))


class TestBrokenPictures:
    """They are left out at the start; a step that drew one would end the run."""

    def broken(self, world, folder, *numbers):
        """The world's shards, where some pictures are cut off."""
        with tarfile.open(world / "world" / "world-000000.tar") as tar:
            members = [(one.name, tar.extractfile(one).read()) for one in tar]
        pictures = [name for name, _ in members if name.endswith(".png")]
        cut = {pictures[number] for number in numbers or range(len(pictures))}
        write_tar(
            folder / "world-000000.tar",
            [(name, data[: len(data) // 2] if name in cut else data) for name, data in members],
        )
        return str(folder)

    def test_they_are_counted_and_left_out(self, world, tmp_path):
        shards = self.broken(world, tmp_path / "broken", 2, 5)
        made = train(options(world, tmp_path / "run", shards=(shards,)), load_recipe("tiny", (*FAST, "steps=1")))
        assert list(made.left_out.values()) == [2]
        assert "can't be used, the first of them 'p000001c0' of world-000000.tar: PNG of" in str(made.left_out)
        assert made.samples + made.held_out == 14

    def test_none_that_can_be_read(self, world, tmp_path):
        shards = self.broken(world, tmp_path / "broken")
        said = r"none of the 16 samples of .*parquet in the shards can be read; 'p000000c0' of world-000000.tar: PNG of"
        with pytest.raises(UsageError, match=said):
            train(options(world, tmp_path / "run", shards=(shards,)), load_recipe("tiny", FAST))

    def test_a_strip_that_no_size_fits(self, tmp_path):
        with io.BytesIO() as file:
            Image.new("RGB", (1000, 2)).save(file, "PNG")
            write_tar(tmp_path / "a.tar", [("s.png", file.getvalue()), ("s.txt", b"a line")])
        ((sample, place),) = collect(expand([str(tmp_path / "a.tar")]), tmp_path / "pictures.bin", lambda _: True)
        assert "aspect ratio" in sample.failure.error
        assert place.size == (tmp_path / "pictures.bin").stat().st_size == 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "error", "said"),
        [
            ({"algorithm": "sgd"}, UsageError, "no algorithm is called 'sgd': there are sft, risd"),
            ({"model": "./nowhere"}, ModelError, "no model folder at './nowhere'"),
            ({"data": "nowhere.parquet"}, TableError, "nowhere.parquet"),
        ],
    )
    def test_arguments(self, world, tmp_path, changes, error, said):
        with pytest.raises(error, match=said):
            train(options(world, tmp_path / "run", **changes), load_recipe("tiny", FAST))

    def test_shards_that_hold_none_of_it(self, world, tmp_path):
        write_world(tmp_path / "other" / "deeper", WorldOptions(prompts=1, candidates=1, raters=1, per_shard=1))
        (tmp_path / "other" / "deeper" / "world-000000.tar").rename(tmp_path / "other" / "x.tar")
        changed = options(world, tmp_path / "run", shards=(str(tmp_path / "other"),))
        with pytest.raises(UsageError, match=r"none of the 16 samples of .*annotations\.parquet is in the shards"):
            train(changed, load_recipe("tiny", FAST))

    @pytest.mark.parametrize(
        ("name", "ends", "change", "said"),
        [
            (
                "prompt",
                ".json",
                lambda data: data.replace(b"a small", b"a huge"),
                "has the prompt 'a .*', in the shards",
            ),
            ("key", "", None, "has the key 'p000000c0', in the shards 'q000000c0'"),
        ],
    )
    def test_other_shards_of_the_same_names(self, world, tmp_path, name, ends, change, said):
        """Their pictures would be trained on with the labels of others."""
        for shard in (world / "world").glob("*.tar"):
            rewrite(shard, tmp_path / shard.name, ends, change or (lambda data: data), rename=name == "key")
        changed = options(world, tmp_path / "run", shards=(str(tmp_path / "world-000000.tar"),))
        with pytest.raises(TableError, match=said):
            train(changed, load_recipe("tiny", FAST))

    def test_two_runs_in_one_folder(self, world, tmp_path):
        """The second leaves the first's pictures alone, also where it asks to go on with it."""
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "pictures.bin").write_text("the first's")
        with closing(RunLock(tmp_path / "run")) as lock:
            lock.take()
            for resume in (False, True):
                with pytest.raises(UsageError, match=rf"run is in use by process {os.getpid()}: wait for it, or give"):
                    train(options(world, tmp_path / "run", resume=resume), load_recipe("tiny", FAST))
        assert (tmp_path / "run" / "pictures.bin").read_text() == "the first's"
        assert train(options(world, tmp_path / "run"), load_recipe("tiny", FAST)).steps == 4

    def test_a_lock_that_a_child_inherited(self, tmp_path):
        """Workers of a run that is over hold the file open; the folder is free all the same."""
        lock = RunLock(tmp_path / "run")
        lock.take()
        kept = os.dup(lock._descriptor)
        lock.close()
        with closing(RunLock(tmp_path / "run")) as again:
            again.take()
        os.close(kept)

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def none(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("zscore_trainers.run_files.fcntl.flock", none)
        with pytest.raises(UsageError, match=r"run can't be locked: No locks available: give another$"):
            RunLock(tmp_path / "run").take()

    def test_an_out_that_is_no_folder(self, world, tmp_path):
        (tmp_path / "file").write_text("mine")
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(UsageError, match=r"^--out .* can't be made a folder to write to: .*: give another$"):
                train(options(world, out), load_recipe("tiny", FAST))
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_full_disk(self, world, tmp_path, monkeypatch):
        """What was written before is kept, one line says what to do, and the run goes on from there."""
        saves, save = [], engine_module.state_dict_saver.save

        def full(*arguments, **named):
            saves.append(named["checkpoint_id"])
            if len(saves) == 2:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
            return save(*arguments, **named)

        monkeypatch.setattr(engine_module.state_dict_saver, "save", full)
        recipe = load_recipe("tiny", [*FAST, "save_every=2"])
        said = r"step-00000004 can't be written \(.*598\): .* GiB are free; make room .*is step-00000002$"
        with pytest.raises(EngineError, match=said):
            train(options(world, tmp_path / "run"), recipe)
        assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "done.json").exists()
        assert train(options(world, tmp_path / "run", resume=True), recipe).steps == 4
        assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 4

    def test_no_room_for_the_pictures(self, world, tmp_path):
        code = """
import resource, sys
from pathlib import Path
from zscore.shards import expand
from zscore_trainers.pictures import collect
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
collect(expand([sys.argv[1]]), Path(sys.argv[2]), lambda _: True)
"""
        command = [sys.executable, "-c", code, str(world / "world"), str(tmp_path / "pictures.bin")]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()[-1]
        assert re.match(r"zscore.errors.EngineError: .*pictures.bin can't be written \(File too large\): .* free", said)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"realism": pl.lit("good")}, "has labels or an index that are no numbers: "),
            ({"index": pl.lit("0x")}, "has labels or an index that are no numbers: "),
            ({"index": pl.lit(None, pl.Int64)}, "has rows without shard or index"),
            ({"split": pl.lit(7)}, "no sample to train on in its train split"),
            ({"index": pl.lit(0)}, r"has samples \(shard, index\) more than once"),
        ],
    )
    def test_columns_of_another_kind(self, world, tmp_path, change, said):
        table = pl.read_parquet(world / "annotated" / "annotations.parquet").with_columns(**change)
        table.write_parquet(tmp_path / "a.parquet")
        with pytest.raises(TableError, match=said):
            train(options(world, tmp_path / "run", data=str(tmp_path / "a.parquet")), load_recipe("tiny", FAST))

    def test_tables_that_lie_beside_the_right_one(self, world, tmp_path):
        for name, said in (
            ("annotated/pairs.parquet", "holds pairs; the pictures' own labels are wanted: annotations.parquet"),
            ("world/ratings.csv", "is no parquet table: make annotations.parquet with `zscore annotations build`"),
        ):
            with pytest.raises(TableError, match=said):
                train(options(world, tmp_path / "run", data=str(world / name)), load_recipe("tiny", FAST))
        parquet = str(world / "annotated" / "annotations.parquet")
        with pytest.raises(TableError, match=r"isn't text: reasonings are given as lines of JSON"):
            train(options(world, tmp_path / "run", algorithm="rewarddance", data=parquet), load_recipe("tiny"))

    def test_test_prompts_of_the_ratings(self, world, tmp_path):
        """A teacher's scores know no split: what is kept for evaluation is named."""
        table = pl.read_parquet(world / "annotated" / "annotations.parquet")
        held = table["prompt"].unique().sort()[:3]
        split = pl.when(pl.col("prompt").is_in(held.implode())).then(pl.lit("test")).otherwise(pl.lit("train"))
        table.with_columns(split=split).write_parquet(tmp_path / "a.parquet")
        asked = options(world, tmp_path / "run", without=str(tmp_path / "a.parquet"))
        made = train(asked, load_recipe("tiny", FAST))
        without = table.filter(pl.col("prompt").is_in(held.implode())).height
        assert made.samples + made.held_out == 16 - without
        assert made.left_out == {f"have a test prompt of {tmp_path / 'a.parquet'}": without}
        table.with_columns(split=pl.lit("test")).write_parquet(tmp_path / "a.parquet")
        with pytest.raises(UsageError, match="all 16 samples have test prompts of"):
            train(options(world, tmp_path / "other", without=str(tmp_path / "a.parquet")), load_recipe("tiny", FAST))
        table.write_parquet(tmp_path / "a.parquet")  # no split at all: nothing would be left out
        with pytest.raises(TableError, match=r"has no test prompts to leave out: build it with a --test-share above 0"):
            train(options(world, tmp_path / "fourth", without=str(tmp_path / "a.parquet")), load_recipe("tiny", FAST))
        with pytest.raises(TableError, match=r"isn't a table of annotations \(annotations.parquet\)"):
            train(options(world, tmp_path / "third", without=str(tmp_path)), load_recipe("tiny", FAST))

    def test_prompts_elsewhere_in_the_shards(self, world, tmp_path):
        for shard in (world / "world").glob("*.tar"):
            rewrite(shard, tmp_path / shard.name, ".json", lambda data: data.replace(b'"prompt"', b'"text"'))
        shards = (str(tmp_path / "world-000000.tar"),)
        with pytest.raises(UsageError, match="--prompt-keys"):
            train(options(world, tmp_path / "run", shards=shards), load_recipe("tiny", FAST))
        asked = options(world, tmp_path / "other", shards=shards, read=ReadOptions(prompt_keys="json:text"))
        assert train(asked, load_recipe("tiny", FAST)).left_out == {}

    @pytest.mark.parametrize(
        ("algorithm", "layout", "wanted"),
        [
            ("sft", "reasoning", "joint or layout=separate"),
            ("gdso", "joint", "reasoning"),
            ("opd", "separate", "reasoning"),
        ],
    )
    def test_a_layout_that_it_has_no_loss_for(self, world, tmp_path, algorithm, layout, wanted):
        recipe = load_recipe("tiny", ("steps=1", f"layout={layout}"), algorithm)
        with pytest.raises(
            UsageError, match=f"layout is {layout}, which {algorithm} can't learn: --set layout={wanted}"
        ):
            train(options(world, tmp_path / "run", algorithm=algorithm), recipe)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"recipe": "layout=joint"}, "layout is joint, which opd can't learn"),
            ({}, "opd: --teacher names the checkpoint"),
            ({"teacher": "./nowhere"}, "no model folder at './nowhere'"),
        ],
    )
    def test_a_dry_run_refuses_what_the_run_would(self, world, tmp_path, changes, said):
        recipe = load_recipe("tiny", [changes["recipe"]] if "recipe" in changes else [], "opd")
        asked = options(world, tmp_path / "run", algorithm="opd", teacher=changes.get("teacher"))
        with pytest.raises((UsageError, ModelError), match=said):
            check(asked, recipe)

    def test_a_prompt_that_is_too_long_is_left_out(self, world, tmp_path):
        """And not found at the step that draws it."""
        long = "a small red circle " * 5000
        (shard,) = (world / "world").glob("*.tar")
        rewrite(
            shard,
            tmp_path / shard.name,
            "p000002c1.json",
            lambda data: json.dumps(json.loads(data) | {"prompt": long}).encode(),
        )
        table = pl.read_parquet(world / "annotated" / "annotations.parquet")
        longer = pl.when(pl.col("key") == "p000002c1").then(pl.lit(long)).otherwise("prompt").alias("prompt")
        table.with_columns(longer).write_parquet(tmp_path / "a.parquet")
        asked = options(world, tmp_path / "run", shards=(str(tmp_path / shard.name),), data=str(tmp_path / "a.parquet"))
        made = train(asked, load_recipe("tiny", (*FAST, "steps=1")))
        assert list(made.left_out.values()) == [1]
        assert "the first of them 'p000002c1' of world-000000.tar: 20049 tokens" in str(made.left_out)
        assert made.samples + made.held_out == 15

    def test_everything_held_out(self, world, tmp_path):
        with pytest.raises(UsageError, match="all 16 samples are held out: lower held_out"):
            train(options(world, tmp_path / "run"), load_recipe("tiny", (*FAST, "held_out=1.0")))


class TestTargets:
    def labels(self, tmp_path, **columns):
        frame = pl.DataFrame({"shard": ["a.tar"] * 3, "index": [0, 1, 2], "prompt": ["p"] * 3, "split": "train"})
        values = {name: [1.0, 3.5, 5.0] for name in RUBRIC.names} | columns
        path = tmp_path / "labels.parquet"
        frame.with_columns(**{name: pl.Series(one) for name, one in values.items()}).write_parquet(path)
        return str(path)

    def test_labels_become_the_level(self, tmp_path):
        found = read_targets(self.labels(tmp_path), RUBRIC)
        assert {key: one.argmax(-1).tolist() for key, one in found.items()} == {
            ("a.tar", 0): [0] * 4,
            ("a.tar", 1): [5] * 4,
            ("a.tar", 2): [8] * 4,
        }

    @pytest.mark.parametrize("nothing", [None, float("nan")])
    def test_a_dimension_without_a_label_has_no_target(self, tmp_path, nothing):
        found = read_targets(self.labels(tmp_path, realism=[1.0, nothing, 5.0]), RUBRIC)
        assert list(found) == [("a.tar", 0), ("a.tar", 1), ("a.tar", 2)]
        assert np.isnan(found["a.tar", 1]).all(-1).tolist() == [name == "realism" for name in RUBRIC.names]
        assert np.isfinite(found["a.tar", 0]).all()
        assert found.left_out == {"have no label on realism, only on others": 1}

    def test_a_picture_without_any_label_is_left_out(self, tmp_path):
        path = self.labels(tmp_path, **{name: [1.0, None, 5.0] for name in RUBRIC.names})
        found = read_targets(path, RUBRIC)
        assert set(found) == {("a.tar", 0), ("a.tar", 2)}
        assert found.left_out == {"have no label on any dimension": 1}

    def test_no_label_at_all(self, tmp_path):
        path = self.labels(tmp_path, **{name: pl.Series([None] * 3, dtype=pl.Float64) for name in RUBRIC.names})
        with pytest.raises(TableError, match="no sample to train on in its train split: 3 have no label on any dim"):
            read_targets(path, RUBRIC)

    def test_another_scale_and_another_split(self, tmp_path):
        with pytest.raises(TableError, match=r"a label is outside 1 to 5: the labels are on another scale"):
            read_targets(self.labels(tmp_path, realism=[1.0, 3.0, 100.0]), RUBRIC)
        with pytest.raises(TableError, match="no sample to train on in its test split"):
            read_targets(self.labels(tmp_path), RUBRIC, "test")
        with pytest.raises(TableError, match="no labels of 'quality'"):
            read_targets(self.labels(tmp_path), load_rubric("q-align"))

    def test_scores_of_another_rubric(self, tmp_path):
        path = write_scores(tmp_path / "scores.parquet", [row(0)])
        with pytest.raises(TableError, match="scored with rubric 'z-reward', whose dimensions or levels aren't"):
            read_targets(str(path), load_rubric("q-align"))
        assert read_targets(str(path), load_rubric("z-reward")).keys() == {(row(0).shard, 0)}

    def test_rows_without_scores(self, tmp_path):
        rows = [row(0, status="no_score"), row(1, status="no_score"), row(2, status="bad_image")]
        path = str(write_scores(tmp_path / "scores.parquet", rows))
        said = r"no sample to train on: 2 have no scores \(no_score\), 1 have no scores \(bad_image\)"
        with pytest.raises(TableError, match=said):
            read_targets(path, load_rubric("z-reward"))


class TestRecipes:
    @pytest.mark.parametrize("name", sorted(RECIPES))
    def test_every_setting_has_one_place(self, name):
        recipe = load_recipe(name)
        assert load_rubric(recipe.rubric).name == recipe.rubric
        assert {"steps", "learning_rate", "batch_size", "layout"} <= set(settings(recipe))

    def test_settings_are_changed_by_name(self):
        recipe = load_recipe(
            "tiny", ["steps=7", "mass=0", "layout=separate", "betas=0.8,0.9", "gradient_checkpointing=true"]
        )
        changed = settings(recipe)
        assert (changed["steps"], changed["mass"], changed["layout"]) == (7, 0.0, "separate")
        assert changed["betas"] == (0.8, 0.9)
        assert changed["gradient_checkpointing"] is True

    @pytest.mark.parametrize(
        ("name", "change", "said"),
        [
            ("tinny", "steps=1", "no recipe is called 'tinny': did you mean 'tiny'?"),
            ("tiny", "step=1", "--set step: no such setting: did you mean 'steps'?"),
            ("tiny", "steps", "--set 'steps': write KEY=VALUE"),
            ("tiny", "steps=many", "--set steps=many: a whole number like 20 is wanted"),
            ("tiny", "steps=0", "steps is 0: at least 1"),
            ("tiny", "gradient_checkpointing=perhaps", "perhaps: true or false is wanted"),
        ],
    )
    def test_what_cannot_be_meant(self, name, change, said):
        with pytest.raises(UsageError) as raised:
            load_recipe(name, [change])
        assert said in str(raised.value)


class TestHeldOut:
    def test_a_share_of_the_prompts(self):
        held = [is_held_out(f"prompt {number}", 0.2) for number in range(2000)]
        assert 0.16 < np.mean(held) < 0.24
        assert not any(is_held_out(f"prompt {number}", 0.0) for number in range(100))

    def test_a_policy_that_knows_the_answers_is_right(self, world, tmp_path):
        train_set = world_set.world_set(tmp_path / "world", prompts=6)
        collate = world_set.collator(train_set, tmp_path / "world", world / "body")

        class Oracle(torch.nn.Module):
            """Gives each sample's own target."""

            def __init__(self, sign):
                super().__init__()
                self.sign = torch.nn.Parameter(torch.tensor(float(sign)))
                self.next = 0

            def forward(self, batch, *, with_logprobs):
                found = torch.from_numpy(train_set.targets_NDK[self.next : self.next + len(batch.tokens_BT)])
                self.next += len(found)
                probs = found if self.sign > 0 else found.flip(-1)
                return type("Output", (), {"score_logits_BDK": probs.clamp(min=1e-9).log()})

        right = HeldOut(collate, RUBRIC.names, RUBRIC.values, 5)(Oracle(1))
        wrong = HeldOut(collate, RUBRIC.names, RUBRIC.values, 5)(Oracle(-1))
        collate.pictures.close()
        assert right["hpa_overall"] == 1
        assert right["plcc_realism"] == pytest.approx(1, abs=1e-6)
        assert wrong["hpa_overall"] == 0
        assert wrong["plcc_realism"] == pytest.approx(-1, abs=1e-6)

    def test_only_what_has_a_target_is_compared(self, world, tmp_path):
        """The mean of a sample's dimensions is over those that have one, on both sides."""
        full = world_set.world_set(tmp_path / "world", prompts=6)
        targets = full.targets_NDK.copy()
        targets[::2, 1], targets[1::2, 2], targets[:, 3] = np.nan, np.nan, np.nan
        collate = world_set.collator(TrainSet(full.samples, full.places, targets), tmp_path / "world", world / "body")
        collate.pictures.close()
        mu_ND = (full.targets_NDK @ np.asarray(RUBRIC.values, np.float32)).astype(np.float32)
        found = HeldOut(collate, RUBRIC.names, RUBRIC.values, 5)
        right = found.agreement(mu_ND)
        assert {name for name in right if name.startswith("plcc")} == {
            "plcc_alignment", "plcc_realism", "plcc_aesthetics", "plcc_overall"
        }  # fmt: skip
        assert [value for value in right.values() if value != pytest.approx(1, abs=1e-6)] == []
        other = np.where(np.isnan(targets).any(-1), 3, mu_ND)  # whatever it says where there is none
        assert found.agreement(other) == right


class TestCommands:
    def call(self, *arguments):
        from typer.testing import CliRunner

        return CliRunner().invoke(build_app(), [str(one) for one in arguments])

    @pytest.mark.parametrize("algorithm", ["risd", "gdso"])
    def test_a_dry_run_lists_settings_as_they_are_set(self, world, tmp_path, algorithm):
        data = ("--data", world / "annotated" / "annotations.parquet", "--recipe", "tiny", "--dry-run")
        places = ("--model", world / "body", "--out", tmp_path / "run")
        said = self.call("train", algorithm, world / "world", *data, *places)
        assert said.exit_code == 0, said.output
        lines = [line.strip() for line in said.output.partition("settings (--set):")[2].splitlines() if line.strip()]
        assert {line.partition("=")[0] for line in lines} == set(settings(load_recipe("tiny", [], algorithm)))
        assert load_recipe("tiny", lines, algorithm) == load_recipe("tiny", [], algorithm)
        assert not (tmp_path / "run").exists()

    def test_from_ratings_to_a_model(self, world, tmp_path):
        made = self.call(
            "annotations",
            "build",
            world / "world" / "ratings.csv",
            world / "world",
            "--out",
            tmp_path / "annotated",
            "--rubric",
            "shapes",
            "--test-share",
            0,
        )
        assert made.exit_code == 0, made.output
        assert "16 pictures (0 for testing)" in made.output
        assert "rater0" in made.output
        table = tmp_path / "annotated" / "annotations.parquet"
        first = pl.int_range(pl.len()) == 0
        pl.read_parquet(table).with_columns(pl.when(~first).then("realism").alias("realism")).write_parquet(table)
        changes = [part for change in (*FAST, "steps=1") for part in ("--set", change)]
        trained = self.call(
            "train",
            "sft",
            world / "world",
            "--data",
            table,
            "--model",
            world / "body",
            "--out",
            tmp_path / "run",
            "--recipe",
            "tiny",
            *changes,
        )
        assert trained.exit_code == 0, trained.output
        assert "hpa_overall" in trained.output
        assert "1 steps on" in trained.output
        assert f"1 samples of {table} have no label on realism, only on others" in trained.output
        assert (tmp_path / "run" / "model" / "model.safetensors").exists()
