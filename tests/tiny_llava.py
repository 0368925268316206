"""A tiny LLaVA: another family than Qwen, with a sentencepiece-like tokenizer and a chat template of its own."""

from __future__ import annotations

import json
from pathlib import Path

EDGE, PATCH = 56, 14  # pixels of the tower's input, and of a patch: 16 image tokens
CHARACTERS = [chr(code) for code in range(0x21, 0x7F)]
ADDED = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    " {% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def write(folder: Path) -> Path:
    """Weights, tokenizer and processor; float32, random from a fixed seed."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 384,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "projection_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": EDGE,
            "patch_size": PATCH,
        },
        image_token_id=ADDED.index("<image>"),
        image_seq_length=(EDGE // PATCH) ** 2,
    )
    torch.manual_seed(0)
    network = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, (0.3 if "lm_head" in name else 1.0) * weight[0].numel() ** -0.5)
    network.save_pretrained(folder)
    _rename_as_published(folder / "model.safetensors")
    _write_tokenizer(folder)
    _write_processor(folder)
    return folder


def _rename_as_published(file: Path) -> None:
    """Give the tower's weights the names that LLaVA's checkpoints have and vLLM reads."""
    from safetensors.torch import load_file, save_file

    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def _write_tokenizer(folder: Path) -> None:
    vocabulary = {token: number for number, token in enumerate([*ADDED, *(f"<0x{byte:02X}>" for byte in range(256))])}
    vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(["▁", *CHARACTERS])}
    switches = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ADDED.index(token), "content": token, **switches} for token in ADDED],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, sequence],
            "pair": [begin, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [ADDED.index("<s>")], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": vocabulary, "merges": []},
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor", **names}
    _write_json(folder / "tokenizer.json", spec)
    _write_json(folder / "tokenizer_config.json", {**config, "model_max_length": 4096})
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _write_processor(folder: Path) -> None:
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": EDGE},
        "crop_size": {"height": EDGE, "width": EDGE},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    ours = {"processor_class": "LlavaProcessor", "patch_size": PATCH, "vision_feature_select_strategy": "default"}
    _write_json(folder / "preprocessor_config.json", images)
    _write_json(folder / "processor_config.json", {**ours, "num_additional_image_tokens": 1})


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value))
