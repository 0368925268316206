"""The architectures that the recipes are meant for, as their checkpoints' config.json gives them.

With them a run's memory can be planned where no checkpoint is at hand. A run itself reads its checkpoint's own config.

Qwen3.5-9B: the defaults of `transformers.Qwen3_5TextConfig` ("Qwen3.5-9B style") and `Qwen3_5VisionConfig` 5.19: hidden
4096, 32 layers, MLP 12288, 16 query and 4 key heads of 256, 16 key and 32 value heads of 128 in the delta net, a
vocabulary of 248,320; 27 vision blocks of 1152. The checkpoint's own file wasn't read; that its vision tower is this
one, and is 4096 wide at its end (as the language model must be), is taken from converted copies of it.

Qwen3.5-27B: THUDM/slime's `scripts/models/qwen3.5-27B.sh` for hidden 5120, 64 layers, MLP 17408, 24 query and 4 key
heads of 256 and the vocabulary; published copies of its config.json for the delta net's 16 key and 48 value heads of
128, and for the vision tower. Its language model counts 26,895,998,464 weights, as is published.

Both checkpoints also hold a layer that predicts two tokens ahead; transformers drops it, and so do these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

_TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248_320,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
    },
}
_VISION: dict[str, Any] = {
    "model_type": "qwen3_5_vision",
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
}


def _body(**text: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5",
        "tie_word_embeddings": False,
        "text_config": {**_TEXT, **text},
        "vision_config": {**_VISION, "out_hidden_size": text["hidden_size"]},
    }


BODIES: dict[str, dict[str, Any]] = {
    "z-reward-9b": _body(
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=32,
        num_attention_heads=16,
        linear_num_value_heads=32,
    ),
    "z-reward-27b": _body(
        hidden_size=5120,
        intermediate_size=17_408,
        num_hidden_layers=64,
        num_attention_heads=24,
        linear_num_value_heads=48,
    ),
}
"""By the name of the recipe."""


def meta_model(config: Mapping[str, Any]) -> nn.Module:
    """A model of this config (of the Qwen3.5 family) whose weights have shapes and take no memory."""
    import torch

    from zscore._torchvision import ensure_importable

    ensure_importable()
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    with torch.device("meta"):
        model: nn.Module = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config))
    return model
