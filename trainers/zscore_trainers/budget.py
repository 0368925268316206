"""What a run takes of a GPU's memory: counted for weights and moments, estimated for the rest.

Counted: every weight that is trained takes 16 bytes over all GPUs (float32 weight, gradient and AdamW's two moments);
a frozen one 2. What FSDP2 holds whole is in the arithmetic's dtype: the weights outside the blocks and two blocks (one
computes, the next arrives), and, on the way back, their gradients with the float32 copy that is summed over the ranks;
the output projection's gradient comes in two parts (level tokens, whole vocabulary), each as large as itself.

An algorithm that learns from rollouts has more on every GPU: its generator, a whole model with a cache of keys and
values, and its share of the reference or of OPD's teacher, in float32.

Estimated: activations, from the sizes of the tensors that a block saves. They weren't measured on a GPU. All rows are
added up though they don't peak together, so the sum is meant as an upper bound; leave a tenth for fragmentation.

Shape names: H hidden size, I the MLP's inner size, T tokens of a sequence, B sequences of a micro-batch, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zscore.checkpoint import find_checkpoint
from zscore.errors import ModelError, UsageError
from zscore.rubrics.rubric import load_rubric
from zscore_trainers import parallel
from zscore_trainers.bodies import BODIES, meta_model
from zscore_trainers.grpo import GrpoConfig
from zscore_trainers.lora import add_adapters
from zscore_trainers.rollouts import AT_A_TIME
from zscore_trainers.vocabulary import CHUNK, SLICE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from zscore_trainers.recipes import Recipe

GPUS = (8, 16, 32)
GPU_BYTES = 141e9
"""Of an H200."""
TEXT_TOKENS = 512
"""Of the prompt beside the picture: an assumption."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many weights a model has, and where."""

    trained: int
    frozen: int
    block: int
    """In the largest block."""
    rest: int
    """Outside the blocks: embeddings, output projection, merger."""
    rest_trained: int
    block_trained: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one GPU computes at a time."""

    sequences: int
    """B."""
    image_tokens: int
    probes: int
    """Scores read from a sequence."""
    bytes_each: int = 2
    """Of a number of the arithmetic's dtype."""
    checkpointing: bool = True
    text_tokens: int = TEXT_TOKENS
    """Of the prompt and what was written after it."""
    logprobs: bool = False
    """Whether log-probabilities of tokens are wanted."""
    drawn: int = 0
    """Outputs that the generator writes at a time; 0 where there is none."""
    others: int = 0
    """Whole models beside the policy, shared out as it is: a reference, a teacher."""


def counts(model: nn.Module) -> Counts:
    """Count a model's weights; tied ones once."""
    blocks = parallel.blocks(model)
    inside = {id(one) for block in blocks for one in block.parameters()}
    rest = [one for one in model.parameters() if id(one) not in inside]
    every = list(model.parameters())
    return Counts(
        trained=sum(one.numel() for one in every if one.requires_grad),
        frozen=sum(one.numel() for one in every if not one.requires_grad),
        block=max(sum(one.numel() for one in block.parameters()) for block in blocks),
        rest=sum(one.numel() for one in rest),
        rest_trained=sum(one.numel() for one in rest if one.requires_grad),
        block_trained=max(sum(one.numel() for one in block.parameters() if one.requires_grad) for block in blocks),
    )


def budget(found: Counts, config: Mapping[str, Any], work: Work, gpus: int) -> dict[str, float]:
    """Bytes on each of `gpus` GPUs, by what they are for."""
    each = work.bytes_each
    gathered = found.rest + 2 * found.block
    gathered_trained = found.rest_trained + found.block_trained
    text = config["text_config"]
    parts = 2 * text["vocab_size"] * text["hidden_size"] if found.rest_trained else 0
    return {
        "weights (share)": (4 * found.trained + each * found.frozen) / gpus,
        "gradients (share)": 4 * found.trained / gpus,
        "AdamW's moments (share)": 8 * found.trained / gpus,
        "other models (share)": 4 * work.others * (found.trained + found.frozen) / gpus,
        "whole weights": each * gathered * (1 + work.others),
        "whole gradients": (each + 4) * gathered_trained + each * parts,
        "activations": activations(config, work),
        "logits": logits(text["vocab_size"], work),
        "generator": generator(found, text, work),
    }


def activations(config: Mapping[str, Any], work: Work) -> float:
    """Bytes that the backward pass needs: the input of every block, and all of one block (without checkpointing, all).

    The vision tower is four (merge²) times as long as what the language model sees of it.
    """
    text, vision = config["text_config"], config["vision_config"]
    tokens = work.sequences * (work.image_tokens + work.text_tokens)
    patches = work.sequences * work.image_tokens * vision["spatial_merge_size"] ** 2
    inner_text, inner_vision = tokens * _text_block(text, work), patches * _vision_block(vision, work)
    if not work.checkpointing:
        return float(inner_text * text["num_hidden_layers"] + inner_vision * vision["depth"])
    inputs = (
        tokens * text["hidden_size"] * text["num_hidden_layers"] + patches * vision["hidden_size"] * vision["depth"]
    )
    return float(inputs * work.bytes_each + max(inner_text, inner_vision))


def _text_block(text: Mapping[str, Any], work: Work) -> int:
    """Bytes a token of a decoder layer, the larger of its two kinds: what enters each matrix, norm and product.

    The delta net's part is that of transformers' own torch code, whose q, k, v and their decayed copies are float32;
    the fused kernel keeps a third of it.
    """
    common = 6 * text["hidden_size"] + 4 * text["intermediate_size"]
    full = 2 * (3 * text["num_attention_heads"] + 2 * text["num_key_value_heads"]) * text["head_dim"]
    values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    mixed = 2 * (2 * keys + values) + 3 * values
    float32 = 8 * values * 4
    return int(max((common + full) * work.bytes_each, (common + mixed) * work.bytes_each + float32))


def _vision_block(vision: Mapping[str, Any], work: Work) -> int:
    """Bytes a patch of a vision block."""
    return int(9 * vision["hidden_size"] + 2 * vision["intermediate_size"]) * work.bytes_each


def logits(vocabulary: int, work: Work) -> float:
    """Bytes of the logits that exist at one time, twice in float32.

    A slice of the vocabulary at all probes, and all of it at a chunk of tokens whose log-probabilities are wanted.
    """
    found = work.sequences * work.probes * min(SLICE, vocabulary)
    if work.logprobs:
        found += min(CHUNK, work.sequences * work.text_tokens) * vocabulary
    return float(found * (work.bytes_each + 8))


def generator(found: Counts, text: Mapping[str, Any], work: Work) -> float:
    """Bytes of the model that writes: all its weights, and keys and values of all that it writes at a time."""
    if not work.drawn:
        return 0.0
    full = text["num_hidden_layers"] // text.get("full_attention_interval", 4)
    cache = 2 * full * text["num_key_value_heads"] * text["head_dim"] * (work.image_tokens + work.text_tokens)
    return float(work.bytes_each * (found.trained + found.frozen + work.drawn * cache))


def plan(recipe: Recipe, name: str, model: str) -> str:
    """The budget of a recipe on 8, 16 and 32 GPUs, for people.

    Args:
        recipe: with its changes.
        name: of the recipe, which says what architecture it is meant for.
        model: a checkpoint's folder or hub id; where its config.json can't be had, the recipe's own architecture is
            taken, and that is said.

    Raises:
        UsageError: neither gives an architecture of the Qwen3.5 family.
    """
    file = _config_of(model)
    if not file.is_file() and name not in BODIES:
        raise UsageError(
            f"no config.json in '{model}', and recipe '{name}' has no architecture of its own: give a folder"
        )
    config = json.loads(file.read_text()) if file.is_file() else BODIES[name]
    if config.get("model_type") != "qwen3_5":
        raise UsageError(f"{model} is a {config.get('model_type')}: memory is planned for qwen3_5 alone")
    body = meta_model(config)
    if recipe.lora_rank:
        add_adapters(body, recipe.lora_rank, recipe.lora_alpha, recipe.lora_modules)
    found = counts(body)
    origin = str(file) if file.is_file() else f"the architecture of {name}, for '{model}' can't be read from here"
    head = f"{(found.trained + found.frozen) / 1e9:.2f} billion weights ({origin}), {found.trained / 1e9:.2f} trained"
    said = f"{head}\n{table(found, config, [(gpus, _work(recipe, config, gpus)) for gpus in GPUS])}"
    uneven = [str(gpus) for gpus in GPUS if recipe.algorithm.batch_size % gpus]
    if uneven:
        size = recipe.algorithm.batch_size
        said += f"\nbatch_size is {size}: {' or '.join(uneven)} GPUs can't share it, set a multiple"
    return said


def _config_of(model: str) -> Path:
    """Its config.json, which need not be there; a hub id's is fetched where the hub can be reached."""
    try:
        return find_checkpoint(model, weights=False) / "config.json"
    except ModelError:
        return Path(model) / "config.json"


def _work(recipe: Recipe, config: Mapping[str, Any], gpus: int) -> Work:
    """Of the largest micro-batch, with the largest pictures and the longest outputs."""
    algorithm = recipe.algorithm
    written = getattr(algorithm, "max_tokens", 0)
    sides = 2 * algorithm.group if isinstance(algorithm, GrpoConfig) else 1
    share = max(1, algorithm.batch_size // gpus) * sides
    sequences = min(algorithm.micro_batch, share)
    dimensions = len(load_rubric(recipe.rubric).names)
    joint = recipe.layout == "joint"
    vision = config["vision_config"]
    return Work(
        sequences=sequences * dimensions if recipe.layout == "separate" else sequences,
        image_tokens=recipe.max_pixels // (vision["patch_size"] * vision["spatial_merge_size"]) ** 2,
        probes=dimensions if joint else 1,
        bytes_each=4 if recipe.dtype == "float32" else 2,
        checkpointing=recipe.gradient_checkpointing,
        text_tokens=TEXT_TOKENS + written,
        logprobs=recipe.layout == "reasoning",
        drawn=min(AT_A_TIME, share) if written else 0,
        others=int(bool(written) and getattr(algorithm, "beta", 1) > 0),
    )


def table(found: Counts, config: Mapping[str, Any], works: Sequence[tuple[int, Work]]) -> str:
    """The budget in GB (1e9 bytes), a column a number of GPUs; says where it doesn't fit."""
    columns = [budget(found, config, work, gpus) for gpus, work in works]
    lines = [f"{'GB a GPU':<26}" + "".join(f"{f'{gpus} GPUs':>10}" for gpus, _ in works)]
    lines += [f"{name:<26}" + "".join(f"{one[name] / 1e9:>10.2f}" for one in columns) for name in columns[0]]
    totals = [sum(one.values()) for one in columns]
    lines.append(f"{'all':<26}" + "".join(f"{total / 1e9:>10.2f}" for total in totals))
    fits = ["yes" if total <= 0.9 * GPU_BYTES else "no" for total in totals]
    lines.append(f"{f'fits {GPU_BYTES / 1e9:.0f} GB less a tenth':<26}" + "".join(f"{word:>10}" for word in fits))
    return "\n".join(lines)
