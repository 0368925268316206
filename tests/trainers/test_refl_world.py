"""The example that draws along a student's gradient, and the judge that reads truth from parameters."""

from __future__ import annotations

import importlib.util
import random
import sys
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.trainers import world_set
from zscore_trainers.data import Order
from zscore_trainers.engine import Engine, EngineConfig
from zscore_trainers.export import export
from zscore_trainers.recipes import load_recipe
from zscore_trainers.refl import Reward
from zscore_trainers.risd import Risd, RisdConfig
from zscore_trainers.world.judge import truth
from zscore_trainers.world.render import BLUR, GAP, NOISE, PIERCED, RGB, STRIPES, Canvas
from zscore_trainers.world.scenes import DIMENSIONS, Scene, Thing, draw_prompt, draw_scene

PATH = Path(__file__).resolve().parents[2] / "trainers" / "examples" / "refl_world.py"
RED, BLUE = Thing("circle", "red", "large", 4), Thing("square", "blue", "small", 0)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("refl_world_example", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student after a few steps on the world: far from good, but with gradients that mean something to it."""
    root = tmp_path_factory.mktemp("refl-world")
    body = world_set.body(root / "body")
    policy, train = world_set.load(body), world_set.world_set(root / "world")
    collate = world_set.collator(train, root / "world", body)
    with closing(collate.pictures):
        algorithm = Risd(RisdConfig(batch_size=8, micro_batch=8), Order(len(train.samples), 8), collate)
        Engine(policy, algorithm, EngineConfig(steps=12, learning_rate=2e-3), root).run()
    return export(policy, body, root / "student", load_recipe("tiny"), trained="12 steps")


def scored(scenes):
    found = truth(Canvas.of(scenes), [scene.asked for scene in scenes])
    return [dict(zip(DIMENSIONS, row, strict=True)) for row in found.tolist()]


class TestJudge:
    def test_what_is_drawn_from_a_scene_has_the_scene_s_scores(self):
        rng = random.Random(0)
        scenes = [draw_scene(draw_prompt(rng), rng) for _ in range(300)]
        for scene, found in zip(scenes, scored(scenes), strict=True):
            assert found == pytest.approx(scene.truth, abs=1e-4)

    @pytest.mark.parametrize(
        ("name", "unit", "dimension"),
        [
            ("noise_B", NOISE, "realism"),
            ("blur_B", BLUR, "realism"),
            ("stripes_B", STRIPES, "aesthetics"),
            ("gap_B", GAP, "plausibility"),
            ("pierced_B", PIERCED, "plausibility"),
        ],
    )
    def test_a_point_of_a_fault_costs_a_point(self, name, unit, dimension):
        canvas = Canvas.of([Scene((RED,), (RED,))])
        for points, score in ((0.0, 5.0), (1.0, 4.0), (2.25, 2.75), (4.0, 1.0), (9.0, 1.0)):
            moved = replace(canvas, **{name: torch.tensor([points * unit])})
            found = dict(zip(DIMENSIONS, truth(moved, [(RED,)])[0].tolist(), strict=True))
            assert found == pytest.approx({**dict.fromkeys(DIMENSIONS, 5.0), dimension: score}, abs=1e-5)

    def test_kinds_of_a_fault_add_up(self):
        canvas = Canvas.of([Scene((RED,), (RED,), realism=("noise", 1.0))])
        moved = replace(canvas, blur_B=torch.tensor([1.5 * BLUR]))
        assert float(truth(moved, [(RED,)])[0, 1]) == pytest.approx(2.5, abs=1e-5)

    def test_a_grey_ground_is_calm_and_a_coloured_one_is_not(self):
        canvas = Canvas.of([Scene((RED,), (RED,), aesthetics=("garish", 2.0))])
        assert float(truth(canvas, [(RED,)])[0, 2]) == pytest.approx(3.0, abs=1e-4)
        for colour, score in (((0.5, 0.5, 0.5), 5.0), ((0.0, 0.0, 0.0), 1.0), ((1.0, 0.0, 0.0), 1.0)):
            moved = replace(canvas, ground_BC=torch.tensor([colour]))
            assert float(truth(moved, [(RED,)])[0, 2]) == pytest.approx(score, abs=1e-4)

    def test_shapes_are_what_they_are_nearest_to(self):
        canvas = Canvas.of([Scene((RED, BLUE), (RED, BLUE))])
        nudged = replace(canvas, centre_BM2=canvas.centre_BM2 + 9.0, colour_BMC=canvas.colour_BMC * 0.9)
        assert float(truth(nudged, [(RED, BLUE)])[0, 0]) == 5.0
        colours = canvas.colour_BMC.clone()
        colours[0, 0] = torch.tensor(RGB["green"])
        assert float(truth(replace(canvas, colour_BMC=colours), [(RED, BLUE)])[0, 0]) == 3.5
        centres = canvas.centre_BM2.clone()
        centres[0, 1] += torch.tensor([32.0, 0.0])
        assert float(truth(replace(canvas, centre_BM2=centres), [(RED, BLUE)])[0, 0]) == 4.0
        faint = canvas.present_BM.clone()
        faint[0, 1] = 0.4
        assert float(truth(replace(canvas, present_BM=faint), [(RED, BLUE)])[0, 0]) == 3.0
        radii = canvas.radius_BM.clone()
        radii[0, 1] = 11.0
        assert float(truth(replace(canvas, radius_BM=radii), [(RED, BLUE)])[0, 0]) == 4.5


class TestExample:
    def test_scenes_show_what_was_asked_for_with_faults_in_the_rest(self, example):
        scenes = example.faulty(4, 0)
        assert [scene.truth for scene in scenes] == [
            {"alignment": 5.0, "realism": 2.0, "aesthetics": 2.0, "plausibility": 2.0}
        ] * 4
        assert {scene.realism[0] for scene in scenes} == {"noise", "blur"}
        assert scenes == example.faulty(4, 0) != example.faulty(4, 1)

    def test_the_reward_rises_and_parameters_stay_in_range(self, example, student):
        reward = Reward.open(str(student))
        scenes = example.faulty(2, 0)
        before, after = example.improve(reward, scenes, 6, 0.3)
        moved = example.judged(reward, scenes, before, after)
        assert moved.reward[1] > moved.reward[0]
        for name, (_, least, most) in example.RANGES.items():
            values = getattr(after, name)
            assert values.isfinite().all()
            assert least - 1e-6 <= float(values.min()) <= float(values.max()) <= most + 1e-6
            if name not in {"stripes_B", "pierced_B"}:  # at their least from the start, and may stay there
                assert not torch.equal(values, getattr(before, name)), name
        for name in {field.name for field in fields(Canvas)} - set(example.RANGES):
            assert torch.equal(getattr(after, name), getattr(before, name)), name
        assert moved.truth_BD[0].tolist() == [pytest.approx([5.0, 2.0, 2.0, 2.0], abs=1e-4)] * 2

    def test_parameters_that_are_driven_out_of_range_are_put_back(self, example):
        scenes = example.faulty(1, 0)
        for sign in (1.0, -1.0):
            _, after = example.improve(lambda _, pictures: sign * pictures.flatten(1).mean(1), scenes, 3, 50.0)  # noqa: B023
            for name, (_, least, most) in example.RANGES.items():
                values = getattr(after, name)
                assert least - 1e-6 <= float(values.min()) <= float(values.max()) <= most + 1e-6, name

    def test_a_reward_that_is_the_truth_makes_pictures_better(self, example):
        """Away from the picture of the same scene without faults, pixel by pixel: no model, so the answer is known."""
        scenes = example.faulty(2, 0)
        clean = [
            replace(s, realism=("noise", 0.0), aesthetics=("garish", 0.0), plausibility=("floating", 0.0))
            for s in scenes
        ]
        wanted = example.render(Canvas.of(clean))
        before, after = example.improve(lambda _, p: -(p - wanted).square().flatten(1).sum(1), scenes, 60, 0.1)
        asked = [scene.asked for scene in scenes]
        gained = truth(after, asked) - truth(before, asked)
        assert gained[:, 0].tolist() == [0.0, 0.0]
        assert gained[:, 1:3].min() > 1.0
        assert gained[:, 3].min() > 0.5

    def test_truth_comes_from_parameters_alone(self, example, student, monkeypatch):
        """Another opinion of the student changes what it says, and no true score."""
        reward = Reward.open(str(student))
        scenes = example.faulty(1, 0)
        canvas = Canvas.of(scenes)
        one = example.judged(reward, scenes, canvas, canvas)
        monkeypatch.setattr(reward, "scores", lambda prompts, _: torch.full((len(prompts), 4), 1.25))
        other = example.judged(reward, scenes, canvas, canvas)
        assert other.reward == (1.25, 1.25) != one.reward
        assert torch.equal(other.truth_BD[1], one.truth_BD[1])
        grain = replace(canvas, grain_BCHW=torch.randn_like(canvas.grain_BCHW))
        assert torch.equal(truth(grain, [scenes[0].asked]), one.truth_BD[1])

    def test_it_runs_and_says_what_became_of_the_pictures(self, example, student, tmp_path, monkeypatch, capsys):
        out = tmp_path / "pictures"
        options = ["--scenes", "2", "--steps", "2", "--aggregate", "weakest", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["refl_world.py", "--model", str(student), *options])
        example.main()
        lines = capsys.readouterr().out.splitlines()
        said = lines[-len(DIMENSIONS) - 2 :]
        assert said[0].split() == ["true", "before", "after", "student", "before", "after"]
        assert [line.split()[0] for line in said[1:]] == [*DIMENSIONS, "reward"]
        assert [float(line.split()[1]) for line in said[1:5]] == [5.0, 2.0, 2.0, 2.0]
        assert sorted(path.name for path in out.iterdir()) == ["000.png", "001.png"]
        with Image.open(out / "000.png") as picture:
            assert picture.size == (192, 96)
