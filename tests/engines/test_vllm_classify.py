"""The fallback: an architecture of which zscore has no probe model, through vLLM's own classifier."""

import json
from contextlib import closing

import numpy as np
import pytest

from tests import tiny_llava
from tests.engines.vllm_prompts import LEVEL_IDS, LEVEL_VALUES, apart, run
from zscore.demo import tokenizer
from zscore.demo.student import untrained_student
from zscore.engines.vllm import VllmConfig, VllmEngine, open_vllm
from zscore.engines.vllm_classify import VllmClassifyEngine, fallback_notice, rebuild
from zscore.errors import ModelError, UsageError
from zscore.judge import JudgeOptions, plan_judge
from zscore.patches import PixelOptions, cut
from zscore.records import EnginePrompt, Failure, Status

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
CUTTING = PixelOptions(patch=14, merge=2, min_pixels=3136)
LEVELS = {"level_token_ids": LEVEL_IDS, "level_values": LEVEL_VALUES}
SMALL = VllmConfig(dtype="float32", max_model_len=512, max_num_batched_tokens=512, max_num_seqs=4, cpu_cache_gib=0.25)


def picture(seed, height=112, width=168):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def prompt(seed, height=112, width=168):
    pixels = cut(picture(seed, height, width), CUTTING)
    ids = tokenizer.IDS
    words = np.random.default_rng((seed, 1)).integers(0, 700, 20 + seed).tolist()
    image = [ids["<|image_pad|>"]] * (pixels.grid[0] * pixels.grid[1] // 4)
    tokens = (ids["<|im_start|>"], 84, ids["<|vision_start|>"], *image, ids["<|vision_end|>"], *words)
    return EnginePrompt(tokens, (len(tokens) - 1,), pixels)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Qwen2.5-VL, built by transformers."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    ids = tokenizer.IDS
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    network = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, (0.3 if "lm_head" in name else 1.0) * weight[0].numel() ** -0.5)
    network.save_pretrained(folder)
    tokenizer.write(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": 3136, "longest_edge": 1_003_520},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def engine(model):
    with closing(open_vllm(model, **LEVELS, config=SMALL)) as started:
        yield started


@pytest.mark.parametrize("size", [(112, 168), (56, 56), (28, 224)])
def test_picture_is_put_together_as_it_was_cut(size):
    want = picture(1, *size)
    assert np.array_equal(np.asarray(rebuild(cut(want, CUTTING), 2)), want)


def test_notice_names_the_architecture_and_the_cost():
    assert fallback_notice(ARCHITECTURE) == (
        f"{ARCHITECTURE} has no joint probe model in zscore: it is scored through vLLM's own classifier,"
        " one prompt a dimension and a slower image path"
    )


@pytest.mark.vllm
def test_chosen_by_architecture(engine):
    assert type(engine) is VllmClassifyEngine
    assert (engine.name, engine.dtype, engine.max_tokens) == ("vllm", "float32", 512)


@pytest.mark.vllm
def test_agrees_with_transformers_in_float32(engine, model):
    """The one pair of engines that both run float32 on a CPU."""
    from zscore.engines.transformers import TransformersConfig, TransformersEngine

    prompts = [prompt(1), prompt(2, 56, 56), prompt(3, 196, 140), prompt(4)]
    config = TransformersConfig(dtype="float32", batch_size=1)
    reference = run(TransformersEngine(model, **LEVELS, config=config), prompts)
    scores = run(engine, prompts)
    probability, mean = apart(scores, reference)
    assert probability <= 1e-3
    assert mean <= 1e-3
    assert min(apart([scores[0]], [other])[1] for other in scores[1:]) > 0.01


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_llava.write(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def llava_judge(llava):
    return plan_judge(JudgeOptions(model=str(llava), engine="vllm", dtype="float32"))


def llava_logits(folder, prompts):
    """Level logits by transformers alone: its model, its image processor, the placeholder expanded here."""
    import torch
    from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

    network = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPImageProcessor.from_pretrained(folder)
    image = tiny_llava.ADDED.index("<image>")
    rows = []
    for one in prompts:
        pixels = processor(rebuild(one.pixels, 2), return_tensors="pt")["pixel_values"]
        ids = [same for token in one.token_ids for same in ([token] * 16 if token == image else [token])]
        with torch.inference_mode():
            rows.append(network(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1])
    return torch.stack(rows)


@pytest.mark.vllm
def test_another_family_is_prompted_by_its_own_chat_template(llava, llava_judge):
    """A model with none of Qwen's chat tokens: the same distributions as transformers gives on the same prompts."""
    builder = llava_judge.builder
    said = "a cat <image> on </s> a <s> mat"
    prompts = [
        *builder.build(said, cut(picture(1, 96, 160), llava_judge.pixels)),
        *builder.build("", cut(picture(2, 64, 64), llava_judge.pixels)),
    ]
    with closing(llava_judge.engine()) as engine:
        scores = run(engine, prompts)
        assert type(engine) is VllmClassifyEngine
        room = engine.max_tokens - builder.overhead
        longest = builder.build("x" * room, prompts[4].pixels)
        refused = [one for one in run(engine, longest) if isinstance(one, Failure)]
    wanted = llava_logits(llava, prompts)[:, list(builder.level_ids)].softmax(-1).numpy()
    got = np.concatenate([one.probs_DK for one in scores])
    assert np.abs(got - wanted).max() <= 1e-3
    assert np.abs(got[0] - got[4]).max() > 0.005, "two pictures, one score"
    assert [one.status for one in refused] == [Status.PROMPT_TOO_LONG]
    assert "--max-pixels" in refused[0].error


@pytest.mark.vllm
def test_joint_prompts_are_refused_with_the_way_out(engine):
    single = prompt(1)
    with pytest.raises(UsageError, match="--layout separate"):
        engine.submit(0, EnginePrompt(single.token_ids, (5, len(single.token_ids) - 1), single.pixels))
    assert engine.step() == []


@pytest.mark.vllm
def test_architecture_that_vllm_lacks(tmp_path):
    config = {"architectures": ["NoSuchModel"], "text_config": {"vocab_size": 1024}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="vLLM doesn't serve NoSuchModel: use --engine transformers"):
        open_vllm(tmp_path, **LEVELS, config=SMALL)


@pytest.mark.vllm
def test_our_own_architecture_keeps_its_probe_model():
    with closing(
        open_vllm(untrained_student(), **LEVELS, config=VllmConfig(max_model_len=256, cpu_cache_gib=0.25))
    ) as ours:
        assert type(ours) is VllmEngine
