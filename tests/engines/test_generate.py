"""Both generators on a tiny model that has learned to reason: what it writes, what it says of it, new weights."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainers import world_set
from tests.trainers.talker import first_caption
from zscore.engines.generate import GenerateConfig, open_generator
from zscore.engines.reasoning import ReasoningEngine, draw_seed
from zscore.errors import ModelError
from zscore.reasoning import ReasoningOptions, finder
from zscore.records import Failure, LevelScores, Status

RUBRIC = world_set.RUBRIC
LIMIT = 72


@pytest.fixture(scope="module")
def model(talker):
    return talker


@pytest.fixture(scope="module")
def builder(model):
    return world_set.builder(model, "reasoning")


@pytest.fixture(scope="module")
def collator(model, tmp_path_factory):
    world = tmp_path_factory.mktemp("world")  # the same as the model's, which other tests read at this moment
    return world_set.collator(world_set.world_set(world, prompts=1), world, model, "reasoning")


@pytest.fixture(scope="module")
def prompts(collator):
    """Of all samples and dimensions, as the model has learned them."""
    return [prompt for found in collator.prompts(range(2)) for prompt in found]


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def generator(request, model, builder):
    config = GenerateConfig(max_tokens=LIMIT, batch_size=4)
    opened = open_generator(request.param, model, RUBRIC, builder, config)
    yield opened
    opened.close()


def write(generator, prompts, seeds=None):
    for tag, prompt in enumerate(prompts):
        generator.submit(tag, prompt, seeds[tag] if seeds else tag)
    found = {}
    while len(found) < len(prompts):
        found.update(generator.step())
    return [found[tag] for tag in range(len(prompts))]


def teacher_forced(model, collator, prompt, tokens, weights=None):
    """Log-probabilities of every token at each position of an output, in one forward pass of transformers."""
    policy = world_set.load(model)
    if weights is not None:
        policy.model.load_state_dict(weights)
    batch = collator.pad([dataclasses.replace(prompt, token_ids=(*prompt.token_ids, *tokens), probes=(-1,))])
    with torch.no_grad():
        hidden_1TH = policy._hidden(batch)
        logits_TV = hidden_1TH[0] @ policy.model.get_output_embeddings().weight.T
    start = len(prompt.token_ids) - 1
    return logits_TV[start : start + len(tokens)].log_softmax(-1)


def test_writes_what_was_learned(generator, prompts, builder, model):
    found = finder(RUBRIC, builder.decode, builder.level_ids)
    outputs = write(generator, prompts)
    texts = [builder.decode(output.tokens) for output in outputs]
    assert texts[0].startswith(first_caption(model))
    assert all("Score: " in text for text in texts)
    assert [found.find(output.tokens) for output in outputs] == [len(output.tokens) - 1 for output in outputs]


def test_says_how_likely_its_words_are(generator, prompts, model, collator, builder):
    tolerance = 1e-3 if generator.dtype == "float32" else 0.15
    for prompt, output in zip(prompts[:3], write(generator, prompts[:3]), strict=True):
        wanted_TV = teacher_forced(model, collator, prompt, output.tokens)
        mine_T = wanted_TV.gather(1, torch.tensor(output.tokens)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(output.logprob_T, mine_T, atol=tolerance)
        last_K = wanted_TV[-1, list(builder.level_ids)].softmax(-1).numpy()
        shifted_K = np.exp(output.level_logprob_TK[-1] - output.level_logprob_TK[-1].max())
        np.testing.assert_allclose(shifted_K / shifted_K.sum(), last_K, atol=1e-3 if tolerance < 0.1 else 2e-2)


def test_the_same_seed_writes_the_same_whatever_is_beside_it(generator, prompts):
    together = write(generator, prompts, [7] * len(prompts))
    (alone,) = write(generator, prompts[3:4], [7])
    assert alone.tokens == together[3].tokens


def test_new_weights_change_what_it_thinks(generator, prompts, model):
    """And each name that isn't the checkpoint's fails."""
    trained = load_file(model / "model.safetensors")
    before = write(generator, prompts[:1])[0]
    louder = {name: value * 0.5 if "lm_head" in name else value for name, value in trained.items()}
    try:
        generator.load_weights(louder.items())
        after = write(generator, prompts[:1])[0]
        # Half the logits: less certain of the first word.
        assert after.logprob_T[0] < before.logprob_T[0] - 1e-4
    finally:
        generator.load_weights(trained.items())
    assert write(generator, prompts[:1])[0].tokens == before.tokens
    with pytest.raises(ModelError, match=r"1 weights aren't those of the checkpoint: lm_head.weight is missing"):
        generator.load_weights((name, value) for name, value in trained.items() if name != "lm_head.weight")
    with pytest.raises(ModelError, match=r"nonsense is none of them"):
        generator.load_weights([*trained.items(), ("nonsense", trained["lm_head.weight"])])
    wrong = {name: value[:-1] if name == "lm_head.weight" else value for name, value in trained.items()}
    with pytest.raises(ModelError, match=r"lm_head.weight is \(1023, 128\), not \(1024, 128\)"):
        generator.load_weights(wrong.items())


@pytest.mark.parametrize(
    ("part", "much"),
    [
        ("visual.blocks", 16.0),  # enough of both that bfloat16's rounding is small beside it
        ("visual.merger", 4.0),
        ("embed_tokens", 0.5),
        ("layers.0.", 0.5),
        ("layers.1.", 0.5),
        ("lm_head", 0.5),
    ],
)
def test_new_weights_are_taken_over_whole(generator, prompts, model, collator, builder, part, much):
    """Whichever part is new: its q at the score is that of the same weights in transformers, and isn't the old one."""
    trained = load_file(model / "model.safetensors")
    draws = torch.Generator().manual_seed(0)
    others = {
        name: value + much * value.float().std() * torch.randn(value.shape, generator=draws)
        for name, value in trained.items()
        if part in name and value.ndim > 1
    }
    assert others
    changed = trained | {name: value.to(trained[name].dtype) for name, value in others.items()}
    (before,) = write(generator, prompts[:1])
    try:
        generator.load_weights(changed.items())
        (after,) = write(generator, prompts[:1])
    finally:
        generator.load_weights(trained.items())
    levels = list(builder.level_ids)
    wanted_TK = teacher_forced(model, collator, prompts[0], after.tokens, changed)[:, levels].softmax(-1).numpy()
    old_TK = teacher_forced(model, collator, prompts[0], after.tokens)[:, levels].softmax(-1).numpy()
    mine_TK = torch.from_numpy(after.level_logprob_TK).softmax(-1).numpy()
    exact = generator.dtype == "float32"
    assert np.abs(mine_TK - wanted_TK).max() < (1e-4 if exact else 0.05)
    assert np.abs(mine_TK - wanted_TK).mean() < 0.2 * np.abs(mine_TK - old_TK).mean()
    assert write(generator, prompts[:1])[0].tokens == before.tokens


def test_what_the_checkpoint_says_of_generation_changes_nothing(model, builder, prompts, tmp_path):
    """A penalty in its generation_config.json would draw from another distribution than the policy's."""
    other = tmp_path / "model"
    shutil.copytree(model, other)
    asked = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 1, "min_new_tokens": 60, "suppress_tokens": [300]}
    (other / "generation_config.json").write_text(json.dumps(asked))
    config = GenerateConfig(max_tokens=LIMIT, batch_size=4)
    found = []
    for one in (model, other):
        opened = open_generator("transformers", one, RUBRIC, builder, config)
        found.append(write(opened, prompts[:2]))
        opened.close()
    for mine, theirs in zip(*found, strict=True):
        assert mine.tokens == theirs.tokens
        np.testing.assert_allclose(mine.logprob_T, theirs.logprob_T, atol=1e-5)


class TestEngine:
    def engine(self, generator, builder, **options):
        chosen = ReasoningOptions(max_tokens=LIMIT, **options)
        return ReasoningEngine(generator, finder(RUBRIC, builder.decode, builder.level_ids), RUBRIC.values, chosen)

    def scores(self, engine, prompts):
        for tag, prompt in enumerate(prompts):
            engine.submit(tag, prompt)
        found = {}
        while len(found) < len(prompts):
            found.update(engine.step())
        return [found[tag] for tag in range(len(prompts))]

    def test_reads_the_score_with_its_reasoning(self, generator, prompts, builder, model, collator):
        wanted = collator.train.targets_NDK @ np.array(RUBRIC.values, np.float32)
        found = self.scores(self.engine(generator, builder), prompts)
        assert all(isinstance(one, LevelScores) for one in found)
        np.testing.assert_allclose([one.mean_D[0] for one in found], wanted.ravel(), atol=0.2)
        assert found[0].reasoning[0].startswith(first_caption(model))
        assert "Score" not in found[0].reasoning[0]
        assert found[0].output_tokens > 10

    def test_an_output_that_is_cut_has_no_score(self, model, builder, prompts):
        opened = open_generator("transformers", model, RUBRIC, builder, GenerateConfig(max_tokens=3))
        (found,) = self.scores(self.engine(opened, builder), prompts[:1])
        assert isinstance(found, Failure)
        assert found.status is Status.NO_SCORE

    def test_draws_differ(self, prompts):
        first, second = (draw_seed(0, dataclasses.replace(prompts[0], draw=draw)) for draw in (0, 1))
        assert len({first, second, draw_seed(1, prompts[0]), draw_seed(0, prompts[4])}) == 4
        assert 0 <= first < 2**63


@pytest.mark.vllm
def test_a_prompt_that_is_too_long(model, builder, prompts):
    opened = open_generator("vllm", model, RUBRIC, builder, GenerateConfig(max_tokens=LIMIT, batch_size=2))
    try:
        long = dataclasses.replace(prompts[0], token_ids=(*prompts[0].token_ids, *[5] * opened.max_tokens))
        ((_, found),) = (opened.submit(0, long, 0), opened.step())[1]
        assert isinstance(found, Failure)
        assert found.status is Status.PROMPT_TOO_LONG
    finally:
        opened.close()
