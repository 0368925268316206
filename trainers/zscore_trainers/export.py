"""A trained policy as a Hugging Face folder that `zscore score --model` serves at once."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from zscore.rubrics.rubric import load_rubric
from zscore_trainers import parallel
from zscore_trainers.lora import merged

if TYPE_CHECKING:
    from pathlib import Path

    from zscore_trainers.policy import ScorePolicy
    from zscore_trainers.recipes import Recipe

# Besides the weights and config.json: tokenizer, chat template, processors.
COPIED = ("*.jinja", "tokenizer*", "*processor*.json", "vocab.json", "merges.txt", "generation_config.json")


def export(policy: ScorePolicy, base: Path, out: Path, recipe: Recipe, *, trained: str) -> Path:
    """Write weights (bfloat16), config, tokenizer, processors and `zscore.json`; to be called on all ranks.

    Args:
        policy: what was trained; its parameters are only read.
        base: the checkpoint it started from.
        out: folder to write.
        recipe: says rubric, layout and picture size.
        trained: one line on how it was trained.
    """
    rubric = load_rubric(recipe.rubric)
    weights = parallel.whole_state(policy)
    if parallel.rank():
        return out
    if recipe.lora_rank:
        weights = merged(weights, recipe.lora_alpha / recipe.lora_rank)
    out.mkdir(parents=True, exist_ok=True)
    policy.model.save_pretrained(out, state_dict=weights)  # type: ignore[operator]
    _say_dtype(out / "config.json")
    for pattern in COPIED:
        for file in base.glob(pattern):
            shutil.copyfile(file, out / file.name)
    _set_size(out / "preprocessor_config.json", recipe)
    about = {
        "rubric": rubric.name,
        "rubric_hash": rubric.hash,
        "layout": recipe.layout,
        "levels": [level.token for level in rubric.levels],
        "max_pixels": recipe.max_pixels,
        "trained": trained,
    }
    (out / "zscore.json").write_text(json.dumps(about, indent=2) + "\n")
    return out


def _say_dtype(file: Path) -> None:
    """The config of weights that were float32 while training."""
    config = json.loads(file.read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "bfloat16"
    file.write_text(json.dumps(config, indent=2) + "\n")


def _set_size(file: Path, recipe: Recipe) -> None:
    if file.exists():
        config = json.loads(file.read_text())
        config["size"] = {"longest_edge": max(recipe.max_pixels, recipe.min_pixels), "shortest_edge": recipe.min_pixels}
        file.write_text(json.dumps(config, indent=2) + "\n")
