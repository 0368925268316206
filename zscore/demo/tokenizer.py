"""The demo student's tokenizer: Qwen's pre-tokenizer and special tokens over a small vocabulary learned here."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# In Qwen's order; those of the second tuple are added without being marked special, as in its checkpoints.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ADDED = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_MERGES = 720
SIZE = 256 + _MERGES + len(SPECIAL) + len(ADDED)
IDS = {token: 256 + _MERGES + i for i, token in enumerate(SPECIAL + ADDED)}

# Splits digits one by one, so that "1" … "9" are single tokens wherever they stand.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What the merges are learned from: the words of rubrics and of picture prompts, the level words first.
_LEVEL_WORDS = "excellent good fair poor bad perfect"
_SHAPE_WORDS = """
a and at the I see is are not it on All there Wrong clean calm stand missing grain blur garish ground stripes floating
shapes bar through slight some much extreme form size place colour circle square triangle red green blue yellow purple
orange small large top bottom left right centre Alignment Realism Aesthetics Plausibility Score user assistant
"""
_TEXT = """
You are given a text prompt and the picture that a model made from it. Rate the picture on each of the four
dimensions below, with one of nine levels from 1 (worst) to 9 (best). Alignment: does the image show what the prompt
asks for, with all objects, their number, colours, relations, actions, style and written words? Realism: does the
picture look like a real photograph, or like a true work in the style that was asked for, without artificial or
plastic textures? Aesthetics: are the composition, light, colour and detail pleasing to the eye? Plausibility: are
the anatomy, physics, perspective, hands, faces and text free of distortions and errors? The score of this image for
alignment realism aesthetics plausibility overall quality is. How well does the generated image match the prompt?
Answer with a single level: every detail matches, most details match, some are missing, many are wrong, nothing
matches. The rating of the image quality is excellent, good, fair, poor, bad. user assistant system prompt
a photo of a red cat and a blue dog on the green table in a kitchen, a man with an umbrella walking in the rain at
night, a woman in a yellow dress holding three white flowers, an old house by the sea under a cloudy sky, portrait
of a young girl with long black hair, soft light, high resolution, watercolor painting of mountains and a river,
two birds sitting on a wooden fence, a bowl of fruit with apples, oranges and bananas, a car parked on the street of
a city, a sign that says open, children playing football in the park, close up of an eye, 3d render of a robot
The picture above was generated from this prompt: Text-image alignment: objects, numbers, attributes, relations, style,
written text? everything that the prompt asks for is there and correct; one or two subtle details are missing or wrong;
a main element or several details are missing; only part of the prompt can be recognised; the picture has little or
nothing to do with the prompt. Realism: Do surfaces, light, faces, hands and small structures look like those of a real
picture of the intended style? no trace of generation: texture, light and detail are convincing throughout; subtle
artefacts, seen only on a close look; clear artefacts on the subject, or an overall artificial look; strong artefacts:
melted structures, smeared or noisy texture; broken: most of the picture is distorted or unreadable. Aesthetics: How
good are composition, colour, light and overall visual appeal? outstanding: deliberate, harmonious; pleasing,
with small weaknesses; ordinary: acceptable but flat, cluttered or unbalanced in places; unattractive; ugly or chaotic.
Physical plausibility: Are anatomy, contact, support, perspective, shadow and reflection possible in the world that the
prompt describes? everything could exist and stand as it is shown; one or two subtle violations; a salient violation on
a main element; several salient violations: extra limbs, floating or interpenetrating objects; physically impossible
throughout, against the prompt's intent. Answer with one digit per question: stands for, and so on up to.
"""


def write(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    alphabet = _byte_alphabet()
    merges = _learn_merges(alphabet)
    tokens = [*sorted(alphabet.values()), *(a + b for a, b in merges)]
    assert len(set(tokens)) == 256 + _MERGES, "two merges spell the same token"
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token) for token in IDS],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def _added(token: str) -> dict[str, Any]:
    switches = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": IDS[token], "content": token, **switches, "special": token in SPECIAL}


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": "Qwen3VLProcessor",
        "added_tokens_decoder": {
            str(i): {k: v for k, v in _added(token).items() if k != "id"} for token, i in IDS.items()
        },
        "add_prefix_space": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }


def _byte_alphabet() -> dict[int, str]:
    """Map each byte to the printable character that stands for it in byte-level BPE (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def _learn_merges(alphabet: Mapping[int, str]) -> list[tuple[str, str]]:
    """Plain BPE: merge the most frequent pair, ties by spelling, `_MERGES` times."""
    counts: Counter[str] = Counter(re.findall(r" ?[^\W\d_]+", _TEXT.replace("\n", " ")))
    for level in _LEVEL_WORDS.split():  # whole tokens with and without a space before them
        counts[level] += 100
        counts[f" {level}"] += 100
    for spoken in _SHAPE_WORDS.split():
        counts[spoken if spoken.istitle() else f" {spoken}"] += 100
    words = {tuple(alphabet[b] for b in word.encode()): n for word, n in counts.items()}
    pairs: Counter[tuple[str, str]] = Counter()
    for word, n in words.items():
        _count(pairs, word, n)
    merges: list[tuple[str, str]] = []
    while len(merges) < _MERGES:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in [word for word in words if best[0] in word and best in pairwise(word)]:
            n = words.pop(word)
            _count(pairs, word, -n)
            merged = _merge(word, best)
            words[merged] = n
            _count(pairs, merged, n)
    return merges


def _count(pairs: Counter[tuple[str, str]], word: tuple[str, ...], n: int) -> None:
    for pair in pairwise(word):
        pairs[pair] += n


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            merged.append(word[i] + word[i + 1])
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


_CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' or 'video' in part %}
{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in part %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is not defined or enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""
