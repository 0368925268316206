"""The world's base model: what a step sees, and going on exactly."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import world_set
from zscore.demo.student import build_student
from zscore.patches import patchify
from zscore_trainers.policy import ScorePolicy
from zscore_trainers.world.base import (
    CALM,
    EMBEDDING,
    PLACE_GAIN,
    TEXT,
    TOWER,
    Base,
    BaseConfig,
    load,
    make_base,
    pixel_options,
    prepare,
    ratings,
    see,
)
from zscore_trainers.world.render import Canvas, render, to_uint8
from zscore_trainers.world.scenes import Scene, Thing, caption, draw_scene, reasoning
from zscore_trainers.world.shards import prompt_of
from zscore_trainers.world.sight import CELLS, FAULTS, WIDTHS, _cells, cut, look, patches, told_apart

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
    base = Base(BaseConfig(batch_size=8, unrelated_steps=0), RUBRIC, start)
    policy = world_set.load(start)
    assert isinstance(policy, ScorePolicy)
    found = base.backward(policy, 0)
    assert found["loss"] == pytest.approx(found["words"] + found["divergence"])
    assert all(parameter.grad is not None for parameter in policy.parameters() if parameter.requires_grad)
    again = base.backward(world_set.load(start), 0)
    assert again == found
    assert base.backward(world_set.load(start), 1)["words"] != found["words"]


def test_the_first_steps_compare_with_unrelated_prompts(start, monkeypatch):
    base, asked = Base(BaseConfig(batch_size=6, unrelated_steps=1), RUBRIC, start), []
    monkeypatch.setattr(base, "_say", lambda _, told: asked.append(told) or 1.0)
    assert base.backward(world_set.load(start), 0) == {"loss": 1.0, "words": 1.0}
    assert len(asked[0]) == 6
    assert all(base._told.decode(written.tokens).startswith("I see a ") for _, written in asked[0])
    assert base.backward(world_set.load(start), 1)["divergence"] > 0
    assert len(asked[1]) == 3


def test_the_pictures_are_those_of_the_shards(start):
    scene = Scene((Thing("circle", "red", "large", 4),), (Thing("circle", "red", "large", 4),), seed=1)
    options = pixel_options(start)
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


def drawn(count, split="train"):
    rng = random.Random(split)
    return [draw_scene(prompt_of(split, rng), rng) for _ in range(count)]


def test_prepared_weights_see_everything_and_are_calm(start, tmp_path):
    plain = load_file(start / "model.safetensors")
    folder = prepare(build_student(tmp_path / "ready", text=TEXT))
    ready = load_file(folder / "model.safetensors")
    weight, bias = f"{EMBEDDING}.weight", f"{EMBEDDING}.bias"
    assert torch.equal(ready[weight][:, :, 0], ready[weight][:, :, 1])
    pixels_NF = torch.from_numpy(patches(cut(drawn(128), pixel_options(folder)))) / 127.5 - 1
    answers_NH = (pixels_NF.flatten(1) @ ready[weight].float().sum(2).flatten(1).T) + ready[bias].float()
    # Other scenes than the 64 that the filters were made for; a picture's ground is the same in all its patches.
    assert answers_NH.mean(0).abs().max() < 3 * (1 / 64 + 1 / 128) ** 0.5
    assert ((answers_NH.std(0) > 0.7) & (answers_NH.std(0) < 1.4)).all()
    assert torch.equal(ready["model.visual.pos_embed.weight"], plain["model.visual.pos_embed.weight"] * PLACE_GAIN)
    changed = {weight, bias, "model.visual.pos_embed.weight"}
    ratios = {
        key: float((ready[key].float().norm() / plain[key].float().norm()).nan_to_num(1.0))
        for key in set(plain) - changed
    }
    calmed = {key: ratio for key, ratio in ratios.items() if abs(ratio - 1) > 1e-3}
    assert len(calmed) == 4 * 2 + 2 * 2 + 1  # what writes: two a layer of either stack, and the merger
    assert sorted({round(ratio, 2) for ratio in calmed.values()}) == sorted(gain for *_, gain in CALM)


def test_sight_is_learned_and_nothing_else_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("zscore_trainers.world.base.SIGHT_STEPS", 12)
    monkeypatch.setattr("zscore_trainers.world.sight.SCENES", 16)
    folder = prepare(build_student(tmp_path / "start", text=TEXT))
    before, blind = load_file(folder / "model.safetensors"), load(folder)
    see(folder, log=str)
    after, seeing = load_file(folder / "model.safetensors"), load(folder)
    assert after.keys() == before.keys()
    assert {key for key, value in after.items() if not torch.equal(value, before[key])} <= {
        key for key in before if key.startswith(TOWER)
    }
    scenes = drawn(96, "validation")
    labels = torch.tensor([[bool(form) for form, *_ in _cells(scene)] for scene in scenes])
    seen = torch.from_numpy(patches(cut(scenes, pixel_options(folder))))

    def told_by(model):
        """Share of cells whose emptiness a linear map tells, fitted on the first half."""
        with torch.no_grad():
            features_BCH = look(model.model.visual, seen, len(scenes))
        x_NH, y_N = (one.flatten(0, 1).float() for one in (features_BCH, labels))
        half = len(x_NH) // 2
        map_H = torch.linalg.lstsq(x_NH[:half], y_N[:half, None]).solution
        return float((((x_NH[half:] @ map_H)[:, 0] > 0.5) == (y_N[half:] > 0)).float().mean())

    assert told_by(seeing) > told_by(blind)
    assert told_by(seeing) > 0.95


def test_losses_of_sight_are_those_of_each_cell():
    scene = Scene((), (Thing("square", "blue", "large", 4), None), realism=("blur", 2.5), aesthetics=("garish", 1.0))
    answers = torch.zeros(1, CELLS, sum(WIDTHS))
    for cell in range(CELLS):
        classes = {0: 2, 1: 3, 2: 2} if cell == 4 else {0: 0, 1: 0, 2: 0}
        for cue, chosen in classes.items():
            answers[0, cell, sum(WIDTHS[:cue]) + chosen] = 50.0
        answers[0, cell, sum(WIDTHS[:3]) + cell] = 50.0
        for fault, (_, kind) in enumerate(FAULTS):
            answers[0, cell, sum(WIDTHS[:4]) + fault] = {"blur": 2.5, "garish": 1.0}.get(kind, 0.0)
    assert all(float(loss) < 1e-6 for loss in told_apart(answers, [scene]).values())
    for output, name in (
        (2, "form"),
        (4 + 3, "colour"),
        (4 + 7 + 2, "size"),
        (14 + 4, "place"),
        (14 + 9 + 1, "faults"),
    ):
        wrong = answers.clone()
        wrong[0, 4, output] = -50.0
        losses = told_apart(wrong, [scene])
        assert [key for key, loss in losses.items() if float(loss) > 1e-3] == [name]


def test_an_unrelated_prompt_is_answered_with_what_is_seen_and_what_it_asks_for(start):
    base = Base(BaseConfig(alignment=1.0, unrelated=1.0), RUBRIC, start)
    (scene,) = drawn(1)
    (pixels,) = cut([scene], pixel_options(start))
    prompt, written = base._reasoning(scene, pixels, random.Random(1))
    decode = base._told.decode
    assert written.score_at is None
    said = decode(written.tokens)
    assert said.startswith(caption(scene))
    assert scene.prompt not in decode(prompt.token_ids)
    things = said.removeprefix(caption(scene)).split(" The ")[1:]
    assert things
    assert all(f"a {thing.rpartition(' is ')[0]}" in decode(prompt.token_ids) for thing in things)
    related = Base(BaseConfig(alignment=1.0, unrelated=0.0), RUBRIC, start)
    prompt, written = related._reasoning(scene, pixels, random.Random(1))
    assert decode(written.tokens[: written.score_at]) == f"{reasoning(scene, 'alignment')} {RUBRIC.reasoning_marker}"
    assert scene.prompt in decode(prompt.token_ids)


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr("zscore_trainers.world.base.BaseConfig", lambda: BaseConfig(batch_size=4, unrelated_steps=1))
    monkeypatch.setattr("zscore_trainers.world.base.SIGHT_STEPS", 1)
    monkeypatch.setattr("zscore_trainers.world.sight.SCENES", 4)


@pytest.mark.usefixtures("little")
def test_stops_early_and_goes_on(tmp_path):
    early = make_base(tmp_path / "run", steps=3, until=1)
    assert "1 of 3 steps" in json.loads((early / "zscore.json").read_text())["trained"]
    late = load_file(make_base(tmp_path / "run", steps=3) / "model.safetensors")
    whole = load_file(make_base(tmp_path / "whole", steps=3) / "model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in late.items())


@pytest.mark.usefixtures("little")
def test_goes_on_where_it_stopped(tmp_path, monkeypatch):
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
