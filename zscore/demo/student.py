"""A tiny checkpoint of the Qwen3.5 architecture with random weights, written by code.

It has every part of the real one (gated delta net and full attention layers, a vision tower with merging, byte-level
BPE, special tokens, chat template, processor files) and loads in transformers and in vLLM. Its scores differ between
pictures and prompts, and mean nothing: it is for tests and benchmarks, and what the trained one
(`zscore.demo.trained`) began as.

The same arguments give the same bytes on every machine: the random numbers are NumPy's PCG64, each tensor has a
stream of its own, and nothing depends on a library's own initialisation.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zscore.demo import tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Part of the cache folder's name: raise it when the bytes change.
_REVISION = 4

# Standard deviation of the logits. bfloat16's rounding in an untrained body moves them by about a sixtieth of it; so
# scores differ by 0.1 between pictures, and by 0.01 between engines.
LEVEL_GAIN = 0.3

# vLLM's CPU kernels want bfloat16 and linear head dims of 64 or 128; mrope_section sums to half the rotary dims.
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mamba_ssm_dtype": "float32",
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    },
}
VISION: dict[str, Any] = {
    "model_type": "qwen3_5_vision",
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "deepstack_visual_indexes": [],
}


def build_student(
    folder: Path,
    *,
    seed: int = 0,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint into `folder` (made if absent) and return it.

    Args:
        folder: Where the files go.
        seed: Changes the weights, nothing else.
        text: Overrides of the language model's config, e.g. a larger body for a benchmark.
        vision: Overrides of the vision tower's.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = {**TEXT, **(text or {})}
    vision = {**VISION, **(vision or {}), "out_hidden_size": text["hidden_size"]}
    assert text["vocab_size"] >= tokenizer.SIZE, "the tokenizer has more tokens than the embedding has rows"
    gains = {"embed_tokens": LEVEL_GAIN if text["tie_word_embeddings"] else 1.2, "lm_head": LEVEL_GAIN}
    tensors = {
        name: torch.from_numpy(_draw(name, shape, seed, gains)).to(torch.bfloat16)
        for name, shape in sorted(_shapes(text, vision))
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.write(folder)
    _write_json(folder / "config.json", _config(text, vision))
    _write_processor(folder, vision)
    _write_zscore(folder)
    return folder


def untrained_student() -> Path:
    """Return the folder of an untrained student, built on first use in the user's cache directory.

    Several processes may ask at once: each builds its own copy, the first rename wins.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zscore"
    folder = cache / f"untrained-student-{_REVISION}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
    try:
        build_student(draft)
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first; its bytes are the same
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _shapes(text: Mapping[str, Any], vision: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    yield "model.language_model.embed_tokens.weight", (vocab, hidden)
    yield "model.language_model.norm.weight", (hidden,)
    if not text["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)
    for i, kind in enumerate(_layer_types(text)):
        full = kind == "full_attention"
        parts = _attention_shapes(text) if full else _linear_attention_shapes(text)
        for name, shape in (*parts, *_mlp_shapes(text)):
            yield f"model.language_model.layers.{i}.{name}", shape
    for name, shape in _tower_shapes(vision):
        yield f"model.visual.{name}", shape


def _layer_types(text: Mapping[str, Any]) -> list[str]:
    """Of each layer, `linear_attention` or `full_attention`: as the config lists them, else full at each interval."""
    every = text["full_attention_interval"]
    kinds = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(text["num_hidden_layers"])]
    listed: list[str] = text.get("layer_types") or kinds
    assert len(listed) == text["num_hidden_layers"], f"{len(listed)} layer types for {len(kinds)} layers"
    return listed


def _attention_shapes(text: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    yield "self_attn.q_proj.weight", (2 * queries, hidden)  # queries and their output gates
    yield "self_attn.k_proj.weight", (keys, hidden)
    yield "self_attn.v_proj.weight", (keys, hidden)
    yield "self_attn.o_proj.weight", (hidden, queries)
    yield "self_attn.q_norm.weight", (head,)
    yield "self_attn.k_norm.weight", (head,)


def _linear_attention_shapes(text: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = text["hidden_size"], text["linear_num_value_heads"]
    values = heads * text["linear_value_head_dim"]
    mixed = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + values
    yield "linear_attn.A_log", (heads,)
    yield "linear_attn.dt_bias", (heads,)
    yield "linear_attn.conv1d.weight", (mixed, 1, text["linear_conv_kernel_dim"])
    yield "linear_attn.norm.weight", (text["linear_value_head_dim"],)
    yield "linear_attn.in_proj_qkv.weight", (mixed, hidden)
    yield "linear_attn.in_proj_z.weight", (values, hidden)
    yield "linear_attn.in_proj_b.weight", (heads, hidden)
    yield "linear_attn.in_proj_a.weight", (heads, hidden)
    yield "linear_attn.out_proj.weight", (hidden, values)


def _mlp_shapes(text: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)


def _tower_shapes(vision: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, edge = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = hidden * vision["spatial_merge_size"] ** 2
    yield "pos_embed.weight", (vision["num_position_embeddings"], hidden)
    patch = (hidden, vision["in_channels"], vision["temporal_patch_size"], edge, edge)
    yield from _affine("patch_embed.proj", patch)
    for i in range(vision["depth"]):
        yield from _affine(f"blocks.{i}.norm1", (hidden,))
        yield from _affine(f"blocks.{i}.norm2", (hidden,))
        yield from _affine(f"blocks.{i}.attn.qkv", (3 * hidden, hidden))
        yield from _affine(f"blocks.{i}.attn.proj", (hidden, hidden))
        yield from _affine(f"blocks.{i}.mlp.linear_fc1", (inner, hidden))
        yield from _affine(f"blocks.{i}.mlp.linear_fc2", (hidden, inner))
    yield from _affine("merger.norm", (hidden,))
    yield from _affine("merger.linear_fc1", (merged, merged))
    yield from _affine("merger.linear_fc2", (vision["out_hidden_size"], merged))


def _affine(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _draw(
    name: str, shape: tuple[int, ...], seed: int, gains: Mapping[str, float]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Draw one tensor; the constants keep a picture's influence alive up to the probes."""
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    kind = name.rsplit(".", 2)[-2:]
    if name.endswith("A_log"):  # forget over 3 to 3,000 tokens, so that the picture outlives the prompt
        return np.log(np.geomspace(3e-4, 0.3, shape[0])).astype(np.float32)
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if name.endswith("dt_bias"):
        return np.ones(shape, np.float32)
    if "norm" in kind[0]:  # those of the language model store the weight less one, but for the gated one
        stored_less_one = "language_model" in name and "linear_attn" not in name
        return np.full(shape, 0.0 if stored_less_one else 1.0, np.float32)
    half_width = gains.get(kind[0], 1.0) * math.sqrt(3 / math.prod(shape[1:]))
    uniform = rng.random(shape, np.float32)
    return np.float32(2 * half_width) * (uniform - np.float32(0.5))


def _config(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.IDS["<|im_end|>"]}
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "dtype": "bfloat16",
        "image_token_id": tokenizer.IDS["<|image_pad|>"],
        "video_token_id": tokenizer.IDS["<|video_pad|>"],
        "vision_start_token_id": tokenizer.IDS["<|vision_start|>"],
        "vision_end_token_id": tokenizer.IDS["<|vision_end|>"],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": {**text, **ends, "dtype": "bfloat16", "pad_token_id": tokenizer.IDS["<|endoftext|>"]},
        "vision_config": {**vision, "dtype": "bfloat16"},
    }


def _write_processor(folder: Path, vision: Mapping[str, Any]) -> None:
    """Write what Qwen's own checkpoints say of pictures and videos."""
    shared = {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    _write_json(
        folder / "preprocessor_config.json",
        {
            **shared,
            "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
    )
    _write_json(
        folder / "video_preprocessor_config.json",
        {
            **shared,
            "size": {"longest_edge": 25_165_824, "shortest_edge": 4_096},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    )


def _write_zscore(folder: Path) -> None:
    """Say how the checkpoint is to be used. No rubric hash: untrained, it fits any wording of its rubric."""
    _write_json(
        folder / "zscore.json",
        {
            "rubric": "z-reward",
            "layout": "joint",
            "levels": [str(level) for level in range(1, 10)],
            "max_pixels": 1_048_576,
            "trained": "untrained",
        },
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
