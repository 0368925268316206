"""The world's base model: what a step sees, and going on exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import world_set
from zscore.demo.student import build_student
from zscore.patches import PixelOptions, patchify
from zscore_trainers.policy import ScorePolicy
from zscore_trainers.world.base import SHARP, SHARP_GAIN, TEXT, Base, BaseConfig, cut, make_base, prepare, ratings
from zscore_trainers.world.render import EDGE, Canvas, render, to_uint8
from zscore_trainers.world.scenes import Scene, Thing

RUBRIC = world_set.RUBRIC


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return build_student(tmp_path_factory.mktemp("base"), text=TEXT)


def test_the_body_has_the_layers_that_it_lists(start):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
    layers = model.model.language_model.layers
    assert [hasattr(layer, "linear_attn") for layer in layers] == [True, False, False, False]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(AssertionError, match="4 layer types for 2 layers"):
        build_student(start / "wrong", text={**TEXT, "num_hidden_layers": 2})


def test_a_step_learns_both_ways(start):
    base = Base(BaseConfig(batch_size=8), RUBRIC, start)
    policy = world_set.load(start)
    assert isinstance(policy, ScorePolicy)
    found = base.backward(policy, 0)
    assert found["loss"] == pytest.approx(found["words"] + found["divergence"])
    assert all(parameter.grad is not None for parameter in policy.parameters() if parameter.requires_grad)
    again = base.backward(world_set.load(start), 0)
    assert again == found
    assert base.backward(world_set.load(start), 1)["words"] != found["words"]


def test_the_pictures_are_those_of_the_shards():
    scene = Scene((Thing("circle", "red", "large", 4),), (Thing("circle", "red", "large", 4),), seed=1)
    options = PixelOptions(patch=16, merge=2, min_pixels=EDGE**2, max_pixels=EDGE**2)
    (pixels,) = cut([scene], options)
    (picture,) = to_uint8(render(Canvas.of([scene])))
    assert np.array_equal(pixels.patches_NCPP, patchify(picture, options))
    assert (pixels.grid, pixels.width, pixels.height) == ((6, 6), 96, 96)


def test_ratings_lie_around_the_truth():
    for truth in RUBRIC.values:
        share_K = ratings(truth, RUBRIC)
        assert share_K.sum() == pytest.approx(1)
        assert RUBRIC.values[int(share_K.argmax())] == truth
    assert ratings(3.0, RUBRIC).max() < ratings(5.0, RUBRIC).max()  # people agree on what is perfect


def test_prepared_weights_are_sharp_eyed_and_calm(start, tmp_path):
    plain = load_file(start / "model.safetensors")
    ready = load_file(prepare(build_student(tmp_path / "ready", text=TEXT)) / "model.safetensors")
    name = "model.visual.patch_embed.proj.weight"
    sharp = ready[name][:SHARP].float()
    assert torch.equal(ready[name][SHARP:], plain[name][SHARP:])
    assert (sharp.sum((2, 3, 4)).abs() < 0.05).all()  # blind to an even ground
    assert torch.equal(sharp[:, :, 0], sharp[:, :, 1])
    assert sharp.flatten(1).norm(dim=1).mean() == pytest.approx(SHARP_GAIN / 2**0.5, rel=0.01)
    ratios = {
        key: float((ready[key].float().norm() / plain[key].float().norm()).nan_to_num(1.0))
        for key in plain
        if key != name
    }
    calmed = {key: ratio for key, ratio in ratios.items() if abs(ratio - 1) > 1e-3}
    assert len(calmed) == 4 * 2 + 2 * 2 + 1  # what writes: two a layer of either stack, and the merger
    assert sorted({round(ratio, 2) for ratio in calmed.values()}) == [0.03, 0.05, 0.3]


def test_stops_early_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("zscore_trainers.world.base.BaseConfig", lambda: BaseConfig(batch_size=4))
    early = make_base(tmp_path / "run", steps=3, until=1)
    assert "1 of 3 steps" in json.loads((early / "zscore.json").read_text())["trained"]
    late = load_file(make_base(tmp_path / "run", steps=3) / "model.safetensors")
    whole = load_file(make_base(tmp_path / "whole", steps=3) / "model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in late.items())


def test_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("zscore_trainers.world.base.BaseConfig", lambda: BaseConfig(batch_size=4))
    whole = make_base(tmp_path / "whole", steps=3)

    def stop(step, _):
        if step == 2:
            raise KeyboardInterrupt

    from zscore_trainers import engine

    run = engine.Engine.run
    monkeypatch.setattr(engine.Engine, "run", lambda self, _, until=None: run(self, stop, until=until))
    monkeypatch.setattr("zscore_trainers.world.base.SAVE_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        make_base(tmp_path / "cut", steps=3)
    monkeypatch.setattr(engine.Engine, "run", run)
    found = make_base(tmp_path / "cut", steps=3)
    wanted = load_file(whole / "model.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in load_file(found / "model.safetensors").items())
    assert json.loads((found / "zscore.json").read_text())["trained"].startswith("the world's base model, 3 of 3 steps")
