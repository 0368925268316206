"""The engine with other settings and other checkpoints: each test starts its own vLLM, one after the other."""

import os
import subprocess
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.vllm_prompts import LEVEL_IDS, LEVEL_VALUES, WINDOW, apart, joint, run, separate
from zscore.demo.student import build_student, untrained_student
from zscore.engines.vllm import VllmConfig, VllmEngine
from zscore.errors import ModelError

pytestmark = pytest.mark.vllm
LEVELS = {"level_token_ids": LEVEL_IDS, "level_values": LEVEL_VALUES}
# Against the same prompts in one piece: bfloat16's rounding at another place moves probabilities by up to 5e-3 on this
# checkpoint, a neighbour's row moves them by more than 3e-2.
ROUNDING = 1e-2


def small(**settings):
    return VllmConfig(**{"max_model_len": 1024, "max_num_seqs": 4, "cpu_cache_gib": 0.25, **settings})


def transformers_scores(model, prompts):
    from zscore.engines.transformers import TransformersConfig, TransformersEngine

    engine = TransformersEngine(model, **LEVELS, config=TransformersConfig(dtype="float32", batch_size=1))
    return run(engine, prompts)


STEP = 64
# The end of the prompt lies 0 … WINDOW + 1 tokens behind a multiple of STEP: a cut before, at, in and after the window.
CUT = [joint(seed, words=STEP - 21 + seed) for seed in range(WINDOW + 2)]


@pytest.fixture(scope="module")
def in_one_piece():
    with closing(VllmEngine(untrained_student(), **LEVELS, config=small())) as engine:
        return run(engine, CUT)


def test_prompts_cut_at_every_position_of_the_probe_window(in_one_piece):
    behind = [len(prompt.token_ids) % STEP for prompt in CUT]
    assert behind == list(range(WINDOW + 2))
    settings = small(chunked_prefill=True, max_num_batched_tokens=STEP)
    with closing(VllmEngine(untrained_student(), **LEVELS, config=settings)) as engine:
        assert engine.lockstep
        assert engine._engine.vllm_config.scheduler_config.max_num_batched_tokens == STEP
        alone = [run(engine, [prompt])[0] for prompt in CUT]
        together = run(engine, CUT)  # cut anywhere, with neighbours
    assert apart(in_one_piece, alone)[0] <= ROUNDING
    assert apart(in_one_piece, together)[0] <= ROUNDING
    neighbours = [apart([left], [right])[0] for left, right in pairwise(in_one_piece)]
    assert min(neighbours) > 3 * ROUNDING  # so that a wrong row could not pass


def test_same_scores_after_a_restart(in_one_piece):
    engine = VllmEngine(untrained_student(), **LEVELS, config=small())
    again = run(engine, CUT)
    engine.close()
    engine.close()
    assert apart(in_one_piece, again) == (0, 0)


def test_other_weights_and_a_shorter_limit(tmp_path, in_one_piece):
    model = build_student(tmp_path, seed=5, text={"max_position_embeddings": 256})
    with closing(VllmEngine(model, **LEVELS, config=small())) as engine:
        assert engine.max_tokens == 256
        assert apart(in_one_piece, run(engine, CUT))[1] > 0.03


def test_prefix_cache():
    """One prompt twice: the second separate one is read from the cache, the second joint one never is."""
    words = 700
    single, whole = separate(1, (16, 16), words=words), joint(2, (16, 16), words=words)
    settings = small(prefix_caching=True, max_num_seqs=1)
    cached = {}
    with closing(VllmEngine(untrained_student(), **LEVELS, config=settings)) as engine:
        step = engine._engine.step

        def counting():
            outputs = step()
            cached.update({output.request_id: output.num_cached_tokens for output in outputs})
            return outputs

        engine._engine.step = counting
        first, again, other, twice = run(engine, [single, single, whole, whole])
    assert cached["0"] == cached["2"] == cached["3"] == 0
    assert cached["1"] >= 256
    assert apart([first], [again])[0] <= ROUNDING
    assert apart([other], [twice]) == (0, 0)


def test_tied_embeddings(tmp_path):
    model = build_student(tmp_path, text={"tie_word_embeddings": True})
    prompts = [joint(seed) for seed in range(4)]
    with closing(VllmEngine(model, **LEVELS, config=small())) as engine:
        scores = run(engine, prompts)
        runner = engine._engine.model_executor.driver_worker.worker.model_runner
        kept = runner.get_model().level_head.weight_KH
        stored = load_file(model / "model.safetensors")["model.language_model.embed_tokens.weight"][list(LEVEL_IDS)]
        assert torch.equal(kept, stored)
    probability, mean = apart(scores, transformers_scores(model, prompts))
    assert probability <= 2e-2
    assert mean <= 0.02


def test_checkpoint_without_an_output_projection(tmp_path):
    model = build_student(tmp_path)
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"vLLM can't load .*: the checkpoint has no lm_head.weight"):
        VllmEngine(model, **LEVELS, config=small())


def test_float32_on_a_cpu():
    with pytest.raises(ModelError, match="bfloat16 only: give --dtype bfloat16, or --engine transformers"):
        VllmEngine(untrained_student(), **LEVELS, config=small(dtype="float32"))


QUIET = """
from tests.engines.vllm_prompts import LEVEL_IDS, LEVEL_VALUES, joint, run
from zscore.demo.student import untrained_student
from zscore.engines.vllm import VllmConfig, VllmEngine
import os, sys
preload = os.environ.get("LD_PRELOAD")
engine = VllmEngine(untrained_student(), level_token_ids=LEVEL_IDS, level_values=LEVEL_VALUES,
                    config=VllmConfig(max_model_len=512, max_num_seqs=2, cpu_cache_gib=0.25))
assert len(run(engine, [joint(1), joint(2)])) == 2
engine.close()
assert os.environ.get("LD_PRELOAD") == preload, "vLLM's preloads would reach the decoding workers"
assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
"""


def test_terminal_stays_clean(tmp_path):
    """No log line, no warning, no progress bar, no usage statistics, from the import to the end."""
    inherited = ("VLLM_", "DO_NOT", "TORCH_", "ZSCORE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
    environment |= {"PYTHONPATH": str(Path.cwd()), "HOME": str(tmp_path)}
    environment |= {"XDG_CACHE_HOME": str(untrained_student().parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", QUIET], check=False, capture_output=True, text=True, env=environment, timeout=400
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.rglob("usage_stats.json"))
