"""The engine with its default settings, in real vLLM on the demo student; one engine for the module."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.engines.vllm_prompts import LEVEL_IDS, LEVEL_VALUES, apart, joint, pixels, run
from zscore.demo.student import untrained_student
from zscore.engines.vllm import VllmConfig, VllmEngine
from zscore.errors import EngineError, ModelError
from zscore.records import EnginePrompt, Failure, LevelScores, Status

SMALL = VllmConfig(max_model_len=1024, max_num_batched_tokens=1024, max_num_seqs=4, cpu_cache_gib=0.25)
GRIDS = ((8, 8), (16, 16), (4, 30), (22, 10), (2, 2), (24, 24))
PROMPTS = [joint(seed, grid, words=20 + 7 * seed) for seed, grid in enumerate(GRIDS)]


def levels(token_ids=LEVEL_IDS, values=LEVEL_VALUES):
    return {"level_token_ids": token_ids, "level_values": values}


@pytest.fixture(scope="module")
def engine():
    started = VllmEngine(untrained_student(), **levels(), config=SMALL)
    yield started
    started.close()


@pytest.fixture(scope="module")
def scores(engine):
    return run(engine, PROMPTS)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def reference(request):
    from zscore.engines.transformers import TransformersConfig, TransformersEngine

    config = TransformersConfig(dtype=request.param, batch_size=1)
    return run(TransformersEngine(untrained_student(), **levels(), config=config), PROMPTS)


pytestmark = pytest.mark.vllm


def runner(engine):
    """vLLM's model runner, where the settings that it really runs with can be read."""
    return engine._engine.model_executor.driver_worker.worker.model_runner


def test_says_what_it_is(engine):
    import vllm

    assert (engine.name, engine.dtype, engine.version) == ("vllm", "bfloat16", vllm.__version__)
    assert (engine.max_tokens, engine.max_in_flight, engine.lockstep) == (1024, 8, False)


def test_agrees_with_transformers(scores, reference):
    probability, mean = apart(scores, reference)
    assert probability <= 2e-2
    assert mean <= 0.02


def test_scores_are_distributions_of_the_rubrics_levels(scores):
    values = np.array(LEVEL_VALUES)
    for result in scores:
        assert result.probs_DK.shape == (4, 9)
        assert all(array.dtype == np.float32 for array in (result.probs_DK, result.mean_D, result.std_D))
        np.testing.assert_allclose(result.probs_DK.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(result.mean_D, result.probs_DK @ values, atol=1e-5)
        spread = np.sqrt((result.probs_DK * (values - result.mean_D[:, None]) ** 2).sum(1))
        np.testing.assert_allclose(result.std_D, spread, atol=1e-4)
        np.testing.assert_allclose(result.entropy_D, -(result.probs_DK * np.log(result.probs_DK)).sum(1), atol=1e-5)


def test_scores_differ_between_pictures_prompts_and_probes(engine):
    same_words = [EnginePrompt(PROMPTS[0].token_ids, PROMPTS[0].probes, pixels(seed)) for seed in (50, 51)]
    other_words = joint(60, picture=same_words[0].pixels)
    first, second, third = run(engine, [*same_words, other_words])
    for left, right in ((first, second), (first, third)):
        assert np.abs(left.mean_D - right.mean_D).max() > 0.03
    assert np.ptp(first.mean_D) > 0.03


def test_scores_do_not_depend_on_the_batch(engine, scores):
    """To the last bit on a CPU: alone, in pairs, in reverse, among twenty of another length."""
    alone = [run(engine, [prompt])[0] for prompt in PROMPTS]
    backwards = run(engine, PROMPTS[::-1])[::-1]
    crowd = run(engine, [*(joint(seed, words=25 + seed) for seed in range(70, 90)), *PROMPTS])[20:]
    assert apart(scores, alone) == apart(scores, backwards) == apart(scores, crowd) == (0, 0)


def test_separate_prompts_of_one_picture(engine, scores):
    """Four prompts that end at the probes of the joint one: each reads what the joint one reads there."""
    whole = PROMPTS[1]
    parts = [EnginePrompt(whole.token_ids[: probe + 1], (probe,), whole.pixels) for probe in whole.probes]
    results = run(engine, parts)
    together = LevelScores(
        *(
            np.concatenate([getattr(part, name) for part in results])
            for name in ("probs_DK", "mean_D", "std_D", "entropy_D")
        )
    )
    assert apart([scores[1]], [together])[0] <= 2e-2


def test_another_engine_of_this_process_may_come_and_go(engine, scores):
    """vLLM's process groups are the process's own: the first engine to close must not take them from the others."""
    other = VllmEngine(untrained_student(), **levels(), config=SMALL)
    assert apart(scores[:1], run(other, PROMPTS[:1])) == (0, 0)
    other.close()
    assert apart(scores[:1], run(engine, PROMPTS[:1])) == (0, 0)


def test_one_picture_runs_through_the_tower_once(engine, monkeypatch):
    """Prompts in flight that share the object share the encoder's output; equal pixels in another object don't."""
    model = runner(engine).get_model()
    grids: list[int] = []
    original = model.embed_multimodal
    monkeypatch.setattr(
        model, "embed_multimodal", lambda **kw: grids.extend(kw["image_grid_thw"][:, 1].tolist()) or original(**kw)
    )
    picture = pixels(7)
    run(engine, [joint(seed, picture=picture) for seed in range(3)] + [joint(9, picture=pixels(7))])
    assert len(grids) == 2
    assert not engine._pictures._held
    assert not engine._pictures._names


def test_only_bytes_travel(engine, monkeypatch):
    """One byte a pixel and channel: no float32, no second temporal slice."""
    sent = []
    original = engine._engine.add_request
    monkeypatch.setattr(
        engine._engine,
        "add_request",
        lambda name, prompt, params: sent.append(prompt) or original(name, prompt, params),
    )
    run(engine, [PROMPTS[1]])
    (item,) = sent[0]["mm_kwargs"]["image"]
    assert item["pixel_values"].data.dtype is torch.uint8
    assert item["pixel_values"].data.shape == (256, 3 * 16 * 16)


def test_read_only_patches(engine, scores):
    """Decoding workers hand over shared memory that must not be written to."""
    patches = PROMPTS[0].pixels.patches_NCPP.copy()
    patches.setflags(write=False)
    frozen = type(PROMPTS[0].pixels)(patches, PROMPTS[0].pixels.grid, 1, 1)
    (result,) = run(engine, [EnginePrompt(PROMPTS[0].token_ids, PROMPTS[0].probes, frozen)])
    assert apart([result], [scores[0]]) == (0, 0)


def test_settings_that_it_really_runs_with(engine):
    config = engine._engine.vllm_config
    assert config.cache_config.mamba_ssm_cache_dtype == "float32"
    assert not config.cache_config.enable_prefix_caching
    assert not config.scheduler_config.enable_chunked_prefill
    assert config.model_config.multimodal_config.mm_processor_cache_gb == 0
    assert engine._engine.renderer.mm_processor_cache is None
    assert config.parallel_config.world_size == 1
    assert not config.model_config.multimodal_config.mm_device_do_normalize


def test_recurrent_states_are_allocated_in_float32(engine):
    layers = engine._engine.vllm_config.compilation_config.static_forward_context
    states = [layer.kv_cache for name, layer in layers.items() if name.endswith("linear_attn")]
    assert len(states) == 3
    assert {state[1].dtype for state in states} == {torch.float32}


def test_only_the_level_rows_of_the_projection_are_kept(engine):
    model = runner(engine).get_model()
    kept = load_file(untrained_student() / "model.safetensors")["lm_head.weight"][list(LEVEL_IDS)]
    assert model.level_head.weight_KH.dtype is kept.dtype
    assert torch.equal(model.level_head.weight_KH, kept)
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name]
    assert model.language_model.lm_head.weight.device.type == "meta"


def test_too_long_is_a_failure_among_scores(engine, scores):
    long = joint(1, words=1024)
    results = run(engine, [PROMPTS[0], long, PROMPTS[2]])
    assert results[1] == Failure(
        Status.PROMPT_TOO_LONG,
        f"{len(long.token_ids)} tokens; the limit is 1024: shorten the prompt or lower --max-pixels",
    )
    assert apart([results[0], results[2]], [scores[0], scores[2]]) == (0, 0)


def test_longest_prompt_is_scored(engine):
    words = 1024 - len(joint(1, words=0).token_ids)
    assert len(joint(1, words=words).token_ids) == 1024
    (result,) = run(engine, [joint(1, words=words)])
    assert isinstance(result, LevelScores)


def test_nan_is_a_failure_of_its_prompt(engine, scores):
    head = runner(engine).get_model().level_head
    rows = head.weight_KH.clone()
    head.weight_KH[3, 0] = torch.nan
    try:
        (result,) = run(engine, [PROMPTS[0]])
    finally:
        head.weight_KH.copy_(rows)
    assert result.status == Status.NONFINITE_SCORE
    assert apart(run(engine, [PROMPTS[0]]), [scores[0]]) == (0, 0)


def test_step_that_breaks_is_an_engine_error(engine, monkeypatch):
    def broken():
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")

    engine.submit(0, PROMPTS[0])
    with monkeypatch.context() as patched:
        patched.setattr(engine._engine, "step", broken)
        with pytest.raises(EngineError, match=r"^vLLM stopped: CUDA out of memory. Tried to allocate 2 GiB$"):
            engine.step()
    assert [tag for tag, _ in engine.step()] == [0]


def test_prompt_that_vllm_refuses_is_an_engine_error(engine):
    tokens = (*PROMPTS[0].token_ids[:-1], 10**6)
    with pytest.raises(EngineError, match="^vLLM refused a prompt: .*") as caught:
        engine.submit(0, EnginePrompt(tokens, PROMPTS[0].probes, PROMPTS[0].pixels))
    assert engine.step() == []
    assert "\n" not in str(caught.value)
    assert run(engine, [PROMPTS[0]])


def test_step_with_nothing_in_flight_returns_at_once(engine):
    assert engine.step() == []


@pytest.mark.parametrize(
    ("token_ids", "values", "message"),
    [
        ((1, 2, 1024), (1.0, 2.0, 3.0), "level token 1024 is outside the model's vocabulary of 1024"),
        ((-1, 2), (1.0, 2.0), "level token -1 is outside"),
        ((1, 2, 1), (1.0, 2.0, 3.0), "two levels have the same token"),
        ((1, 2), (1.0, 2.0, 3.0), "2 level tokens for 3 level values"),
        ((1,), (1.0,), "at least two"),
    ],
)
def test_wrong_level_tokens(token_ids, values, message):
    with pytest.raises(ModelError, match=message):
        VllmEngine(untrained_student(), **levels(token_ids, values))


def broken_copy(tmp_path, change):
    folder = shutil.copytree(untrained_student(), tmp_path / "model")
    change(folder)
    return folder


def test_other_architecture(tmp_path):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlavaForConditionalGeneration"]}))

    with pytest.raises(ModelError, match="is a LlavaForConditionalGeneration; the probe model reads Qwen3_5"):
        VllmEngine(broken_copy(tmp_path, change), **levels())


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_unreadable_config(tmp_path, text):
    def change(folder):
        (folder / "config.json").unlink()
        if text is not None:
            (folder / "config.json").write_text(text)

    with pytest.raises(ModelError, match=r"config\.json"):
        VllmEngine(broken_copy(tmp_path, change), **levels())
