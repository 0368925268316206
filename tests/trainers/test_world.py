"""The rubric world: what is drawn is what the truth says, and what the raters say follows it."""

from __future__ import annotations

import csv
import itertools
import json
import random
import statistics

import numpy as np
import pytest
import torch

from zscore.samples import read_samples
from zscore.shards import expand
from zscore_trainers.world import raters, scenes
from zscore_trainers.world.render import EDGE, Canvas, render, to_uint8
from zscore_trainers.world.scenes import Scene, Thing, caption, draw_prompt, draw_scene, reasoning
from zscore_trainers.world.shards import SPLITS, WorldOptions, draw_groups, split_of, write_world

RED = Thing("circle", "red", "large", 4)
BLUE = Thing("square", "blue", "small", 0)


def drawn(count, seed=0):
    rng = random.Random(seed)
    return [draw_scene(draw_prompt(rng), rng) for _ in range(count)]


def picture(**faults):
    return render(Canvas.of([Scene((RED,), (RED,), **faults)]))[0]


@pytest.mark.parametrize(
    ("shown", "score"),
    [
        ((RED, BLUE), 5.0),
        ((RED, None), 3.0),
        ((RED, Thing("circle", "blue", "small", 0)), 3.5),
        ((RED, Thing("square", "green", "small", 0)), 3.5),
        ((RED, Thing("square", "blue", "small", 1)), 4.0),
        ((RED, Thing("square", "blue", "large", 0)), 4.5),
        ((None, Thing("circle", "green", "large", 1)), 1.0),  # 2 + 4.5, cut off at the worst
    ],
)
def test_alignment_counts_what_is_wrong(shown, score):
    scene = Scene((RED, BLUE), shown)
    assert scene.truth == {"alignment": score, "realism": 5.0, "aesthetics": 5.0, "plausibility": 5.0}


def test_every_true_score_is_a_level_and_all_levels_occur():
    levels = set(np.arange(1, 5.5, 0.5).tolist())
    truths = [scene.truth for scene in drawn(3000)]
    for name in scenes.DIMENSIONS:
        assert {truth[name] for truth in truths} == levels


def test_dimensions_vary_by_themselves():
    truths = np.array([list(scene.truth.values()) for scene in drawn(3000)])
    apart = np.corrcoef(truths.T) - np.eye(4)
    assert np.abs(apart).max() < 0.08


@pytest.mark.parametrize("dimension", ["realism", "aesthetics", "plausibility"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_worse_fault_moves_the_picture_further(dimension, which):
    kinds = {"realism": ("noise", "blur"), "aesthetics": ("garish", "stripes"), "plausibility": ("floating", "pierced")}
    clean = picture()
    apart = [
        float((picture(**{dimension: (kinds[dimension][which], severity)}) - clean).square().mean())
        for severity in np.arange(0, 4.5, 0.5)
    ]
    assert apart[0] == 0
    assert all(worse > better for better, worse in itertools.pairwise(apart))


def test_shapes_stand_in_their_cells_in_their_colours():
    for thing in (RED, BLUE, Thing("triangle", "green", "large", 8)):
        pixels_HWC = to_uint8(render(Canvas.of([Scene((thing,), (thing,))])))[0].astype(float)
        row, column = divmod(thing.place, 3)
        centre = pixels_HWC[row * 32 + 11 : row * 32 + 16, column * 32 + 14 : column * 32 + 18].mean((0, 1))
        assert int(centre.argmax()) == {"red": 0, "green": 1, "blue": 2}[thing.colour]
        empty = pixels_HWC[(2 - row) * 32 : (2 - row) * 32 + 20, ((column + 1) % 3) * 32 : ((column + 1) % 3) * 32 + 20]
        assert empty.reshape(-1, 3).std(0).max() < 6


def test_the_renderer_is_differentiable():
    canvas = Canvas.of(drawn(1, seed=5))
    names = (
        "centre_BM2",
        "radius_BM",
        "colour_BMC",
        "gap_B",
        "pierced_B",
        "ground_BC",
        "stripes_B",
        "noise_B",
        "blur_B",
    )
    leaves = [getattr(canvas, name).double().requires_grad_() for name in names]
    leaves[-1].data += 0.7
    leaves[4].data += 0.3
    rest = {name: getattr(canvas, name).double() for name in ("form_BMF", "present_BM", "grain_BCHW")}
    weight = torch.randn(3, EDGE, EDGE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(*tensors):
        return (render(Canvas(**dict(zip(names, tensors, strict=True)), **rest)) * weight).sum()

    gradients = torch.autograd.grad(value(*leaves), leaves)
    for number, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        step = torch.zeros_like(leaf)
        at = (0,) * leaf.ndim
        step[at] = 1e-5
        moved = [
            value(*(other + sign * step if other is leaf else other for other in leaves)).detach() for sign in (1, -1)
        ]
        assert float(gradient[at]) == pytest.approx(float(moved[0] - moved[1]) / 2e-5, rel=1e-3, abs=1e-4), names[
            number
        ]


def test_words_name_what_is_seen_and_what_is_wrong():
    scene = Scene((RED, BLUE), (Thing("circle", "green", "large", 4), None), realism=("blur", 2.0))
    assert caption(scene) == "I see a large green circle at the centre."
    assert reasoning(scene, "alignment") == (
        "I see a large green circle at the centre. The large red circle at the centre is green."
        " The small blue square at the top left is missing."
    )
    elsewhere = Scene((RED, BLUE), (Thing("square", "red", "small", 5), BLUE))
    assert reasoning(elsewhere, "alignment").endswith(
        " The large red circle at the centre is small, square, at the right."
        " The small blue square at the top left is there."
    )
    assert reasoning(scene, "realism") == "I see blur on it, much."
    assert reasoning(scene, "aesthetics") == "The ground is calm."


def test_raters_agree_most_at_the_ends():
    found = {
        truth: statistics.stdev(raters.rate({"x": truth}, rater % 7, rater)["x"] for rater in range(2000))
        for truth in (1.0, 3.0, 5.0)
    }
    assert found[3.0] > 1.5 * max(found[1.0], found[5.0])
    mean = statistics.mean(raters.rate({"x": 3.0}, rater, rater)["x"] for rater in range(2000))
    assert mean == pytest.approx(3, abs=0.05)


def test_splits_share_no_prompt():
    prompts = {
        split: {group[0].prompt for group in itertools.islice(draw_groups(WorldOptions(split=split, seed=seed)), 150)}
        for seed, split in enumerate(SPLITS)
    }
    assert all(split_of(prompt) == split for split, some in prompts.items() for prompt in some)
    for one, other in itertools.combinations(prompts.values(), 2):
        assert not one & other


def test_no_prompt_comes_twice():
    groups = list(itertools.islice(draw_groups(WorldOptions(split="test", candidates=1)), 400))
    prompts = [group[0].prompt for group in groups]
    assert len(set(prompts)) == 400
    assert 10 < sum(" and " not in prompt for prompt in prompts) < 60  # all there are for one thing, and no more


def test_files_are_ordinary_shards_with_ratings_and_truth(tmp_path):
    options = WorldOptions(split="test", prompts=5, candidates=3, raters=2, per_shard=2, seed=3)
    paths = write_world(tmp_path / "one", options)
    assert [path.name for path in paths] == [f"world-{number:06d}.tar" for number in range(3)]
    samples = [sample for shard in expand([str(tmp_path / "one")]) for sample in read_samples(shard)]
    wanted = [scene for group in itertools.islice(draw_groups(options), 5) for scene in group]
    assert [sample.prompt for sample in samples] == [scene.prompt for scene in wanted]
    assert not any(sample.failure for sample in samples)
    truth = list(csv.DictReader((tmp_path / "one" / "truth.csv").read_text().splitlines()))
    assert len(truth) == 15 * 4
    assert float(truth[4]["score"]) == wanted[1].truth["alignment"]
    assert len((tmp_path / "one" / "ratings.csv").read_text().splitlines()) == 1 + 15 * 4 * 2
    words = [json.loads(line) for line in (tmp_path / "one" / "reasoning.jsonl").read_text().splitlines()]
    assert words[5]["reasoning"] == reasoning(wanted[1], "realism")
    write_world(tmp_path / "two", options)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_a_set_that_was_cut_off_has_no_tables(tmp_path, monkeypatch):
    """Not even those of an older set: who finds truth.csv takes the set for whole."""
    options = WorldOptions(prompts=2, candidates=1)
    write_world(tmp_path, options)
    pngs = "zscore_trainers.world.shards._pngs"
    monkeypatch.setattr(pngs, lambda scenes: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path, options)
    assert [path.name for path in tmp_path.iterdir()] == ["world-000000.tar"]
