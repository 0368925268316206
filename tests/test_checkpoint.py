from __future__ import annotations

import json
import shutil

import pytest

from zscore.checkpoint import find_checkpoint, read_checkpoint, read_normalization, weights_hash
from zscore.demo.student import untrained_student
from zscore.errors import ModelError
from zscore.judge import JudgeOptions, plan_judge


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(untrained_student(), tmp_path / "model")


def edit(folder, name, change):
    path = folder / name
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def image_settings(folder):
    return "preprocessor_config.json" if (folder / "preprocessor_config.json").exists() else "processor_config.json"


def test_a_checkpoint_says_what_it_is():
    checkpoint = read_checkpoint(str(untrained_student()))
    assert checkpoint.architecture == "Qwen3_5ForConditionalGeneration"
    assert (checkpoint.rubric, checkpoint.layout) == ("z-reward", "joint")
    assert (checkpoint.patch, checkpoint.merge) == (16, 2)
    assert read_normalization(checkpoint.path) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("zscore.json", "max_pixels", "1M"),
        ("zscore.json", "max_pixels", 0),
        ("images", "patch_size", {"height": 16, "width": 16}),
        ("images", "merge_size", -2),
        ("images", "min_pixels", 1.5),
        ("text", "max_position_embeddings", "long"),
    ],
)
def test_a_field_that_isn_t_a_whole_number_is_named(folder, name, field, value):
    if name == "text":
        edit(folder, "config.json", lambda data: data["text_config"].update({field: value}))
    else:
        edit(folder, image_settings(folder) if name == "images" else name, lambda data: data.update({field: value}))
    with pytest.raises(ModelError, match=rf"{field} is .*a whole number of at least 1 is wanted"):
        read_checkpoint(str(folder))


def test_older_settings_are_understood(folder):
    edit(folder, image_settings(folder), lambda data: data.update({"size": 224}))
    assert read_checkpoint(str(folder)).min_pixels >= 1


def test_missing_and_malformed_files_are_named(folder):
    (folder / "zscore.json").write_text('{"layout": "both"}')
    with pytest.raises(ModelError, match="layout is 'both'; known are joint, separate"):
        read_checkpoint(str(folder))
    (folder / "zscore.json").write_text("[]")
    with pytest.raises(ModelError, match=r"zscore\.json holds a list; a JSON object is wanted"):
        read_checkpoint(str(folder))
    (folder / "zscore.json").unlink()
    assert "no zscore.json" in read_checkpoint(str(folder)).trained
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json can't be read"):
        read_checkpoint(str(folder))
    with pytest.raises(ModelError, match="no model folder at '/none/at/all'"):
        find_checkpoint("/none/at/all")
    with pytest.raises(ModelError, match="can't get 'org/name' from the hub"):
        find_checkpoint("org/name")


def test_the_weights_hash_follows_the_bytes_and_the_size(folder, monkeypatch):
    before = weights_hash(folder)
    assert before == weights_hash(untrained_student())
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert weights_hash(folder) != before
    monkeypatch.setattr("zscore.checkpoint.FULL_HASH_BYTES", 1000)
    sampled = weights_hash(folder)
    assert sampled.startswith("sha256-sampled:")
    with file.open("ab") as stream:
        stream.write(b"x")
    assert weights_hash(folder) != sampled


def test_notices_tell_what_a_user_must_know(folder):
    options = JudgeOptions(model=str(folder), engine="transformers")
    assert plan_judge(options).notices == ()
    (separate,) = plan_judge(JudgeOptions(model=str(folder), engine="transformers", layout="separate")).notices
    assert "trained in the joint layout" in separate
    edit(folder, "zscore.json", lambda data: data.update({"rubric_hash": "0" * 64}))
    (rubric,) = plan_judge(options).notices
    assert "trained on another rubric" in rubric
    (folder / "zscore.json").unlink()
    (shot,) = plan_judge(options).notices
    assert "zero-shot" in shot


def test_auto_takes_the_engine_that_can(folder):
    (notice,) = plan_judge(JudgeOptions(model=str(folder), dtype="float32")).notices
    assert "bfloat16 only" in notice or "vLLM isn't installed" in notice
    edit(folder, "config.json", lambda data: data.update({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}))
    judge = plan_judge(JudgeOptions(model=str(folder)))
    assert judge.engine_name == "transformers"


def test_a_judge_for_showing_reads_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert plan_judge(JudgeOptions(model=str(folder), engine="transformers"), weights=False).weights == "not read"
