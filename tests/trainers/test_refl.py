"""The student as a differentiable reward: the scores that serving gives, and gradients by finite differences."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainers import world_set
from zscore.errors import ModelError, UsageError
from zscore.scorer import Scorer
from zscore_trainers.export import export
from zscore_trainers.recipes import load_recipe
from zscore_trainers.refl import Reward, mean_score, weakest, weighted
from zscore_trainers.world.render import Canvas, render, to_uint8
from zscore_trainers.world.scenes import draw_prompt, draw_scene


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    root = tmp_path_factory.mktemp("refl")
    body = world_set.body(root / "body")
    return export(world_set.load(body), body, root / "student", load_recipe("tiny"), trained="no")


@pytest.fixture(scope="module")
def reward(student):
    return Reward.open(str(student))


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(0)
    return [draw_scene(draw_prompt(rng), rng) for _ in range(3)]


def prompts(scenes):
    return [scene.prompt for scene in scenes]


def test_scores_are_those_that_serving_gives(student, reward, scenes):
    pixels = to_uint8(render(Canvas.of(scenes)))
    with Scorer(str(student), engine="transformers", dtype="float32") as scorer:
        served = scorer.score([(scene.prompt, Image.fromarray(one)) for scene, one in zip(scenes, pixels, strict=True)])
    with torch.no_grad():
        found = reward.scores(prompts(scenes), torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    wanted = [[one[name].mean for name in world_set.RUBRIC.names] for one in served]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4)


def test_all_of_it_follows_to_another_device(student):
    moved = Reward.open(str(student)).to("meta")
    found = [*moved.parameters(), *moved.buffers()]
    assert {one.device.type for one in found} == {"meta"}
    assert any(one is moved.mean_C11 for one in found)
    assert any(one is moved.std_C11 for one in found)


def test_a_resize_is_the_served_one_up_to_rounding(student, reward, scenes):
    pixels = np.kron(to_uint8(render(Canvas.of(scenes[:1])))[0], np.ones((3, 3, 1), np.uint8))
    with Scorer(str(student), engine="transformers", dtype="float32") as scorer:
        (served,) = scorer.score([(scenes[0].prompt, pixels)])
    with torch.no_grad():
        found = reward.scores([scenes[0].prompt], torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    np.testing.assert_allclose(found[0].numpy(), [served[name].mean for name in world_set.RUBRIC.names], atol=5e-3)


@pytest.mark.parametrize("size", [(96, 96), (150, 130)], ids=["as it is", "scaled down"])
def test_gradients_of_the_pixels_by_finite_differences(reward, scenes, size):
    """Each dimension's mean, along the gradient and along another direction; float32 leaves three digits."""
    drawn = torch.nn.functional.interpolate(0.1 + 0.8 * render(Canvas.of(scenes[:1])), size, mode="bilinear")
    picture = drawn.detach().requires_grad_()
    said = prompts(scenes[:1])
    for number in range(4):
        (gradient,) = torch.autograd.grad(reward.scores(said, picture)[0, number], picture)
        assert gradient.abs().max() > 0
        other = gradient.flip(-1) + gradient
        for direction in (gradient / gradient.norm(), other / other.norm()):
            with torch.no_grad():
                ahead, behind = (reward.scores(said, picture + step * direction)[0, number] for step in (0.1, -0.1))
            assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / 0.2, rel=2e-2)
    assert all(one.grad is None and not one.requires_grad for one in reward.parameters())


def test_gradients_reach_what_the_picture_is_drawn_from(reward, scenes):
    canvas = Canvas.of(scenes)
    canvas.noise_B.requires_grad_()
    canvas.blur_B.requires_grad_()
    canvas.ground_BC.requires_grad_()
    (-reward(prompts(scenes), render(canvas))).mean().backward()
    for leaf in (canvas.noise_B, canvas.blur_B, canvas.ground_BC):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().sum() > 0


def test_aggregations():
    mu = torch.tensor([[1.0, 5.0, 3.0, 3.0]])
    assert mean_score(mu).tolist() == [3.0]
    assert weighted([1, 1, 0, 0])(mu).tolist() == [3.0]
    assert weighted([0, 3, 0, 1])(mu).tolist() == [4.5]
    assert 0.9 < float(weakest(mu)) <= 1.0
    assert float(weakest(mu, sharpness=100)) == pytest.approx(1.0, abs=1e-3)


def test_what_does_not_fit_is_refused(reward, tmp_path):
    with pytest.raises(UsageError, match=r"2 prompts for pictures of shape \(1, 3, 96, 96\)"):
        reward(["a", "b"], torch.zeros(1, 3, 96, 96))
    with pytest.raises(UsageError, match=r"\(B, 3, H, W\) is wanted"):
        reward(["a"], torch.zeros(1, 96, 96, 3))
    body = world_set.body(tmp_path / "body")
    (body / "zscore.json").unlink()
    with pytest.raises(ModelError, match="isn't a student of the joint layout"):
        Reward.open(str(body))
