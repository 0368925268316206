"""A checkpoint folder as zscore needs it: where it lies, what it was trained for, how its pictures are cut.

A checkpoint is a Hugging Face folder plus `zscore.json` (rubric, layout, image budget, how it was trained). Only JSON
is read here; the weights are hashed, never unpickled. No torch, no transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from zscore.errors import ModelError
from zscore.rubrics.rubric import LAYOUTS, Layout

# What a picture is scaled to where neither the user nor the checkpoint says: 1,024 image tokens of 32×32 pixels.
DEFAULT_MAX_PIXELS = 1024 * 1024
# Above this much, weights are hashed by samples: reading 18 GB takes longer than loading them.
FULL_HASH_BYTES = 1 << 30
SAMPLES_PER_FILE = 256
SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What the JSON files of a checkpoint say."""

    id: str
    """As the user named it: a folder or a hub id."""
    path: Path
    architecture: str
    """First entry of `architectures` in config.json."""
    rubric: str | None
    """Rubric that it was trained for, or None where there is no zscore.json."""
    rubric_hash: str | None
    layout: Layout | None
    max_pixels: int
    min_pixels: int
    patch: int
    """Patch edge, pixels."""
    merge: int
    """Patches merged into one token, along one edge."""
    max_tokens: int
    """Longest sequence the model takes (max_position_embeddings)."""
    trained: str
    """One line on how it was trained."""


def find_checkpoint(model: str, *, weights: bool = True) -> Path:
    """Folder of a model: the folder itself, or a hub id's snapshot (downloaded if it isn't in the cache).

    Args:
        model: folder or hub id.
        weights: whether the weights are wanted too; without, only small files are downloaded.

    Raises:
        ModelError: no such folder, or the hub can't give it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(f"no model folder at '{model}': give a folder with config.json, or a hub id like org/name")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"can't get '{model}' from the hub, and there is no such folder: {line}") from error


def read_checkpoint(model: str, *, weights: bool = True) -> Checkpoint:
    """Read and check a checkpoint's JSON files; see `find_checkpoint`.

    Raises:
        ModelError: a file is missing or malformed; the message names it.
    """
    path = find_checkpoint(model, weights=weights)
    config = _read_json(path / "config.json", required=True)
    ours = _read_json(path / "zscore.json")
    images = _image_processor(path)
    layout = ours.get("layout")
    if layout is not None and layout not in LAYOUTS:
        raise ModelError(f"{path / 'zscore.json'}: layout is {layout!r}; known are {', '.join(LAYOUTS)}")
    size = images["size"] if isinstance(images.get("size"), dict) else {}
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    cut = "the image processor's settings"
    return Checkpoint(
        id=model,
        path=path,
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        rubric=ours.get("rubric"),
        rubric_hash=ours.get("rubric_hash"),
        layout=cast("Layout | None", layout),
        max_pixels=_whole(ours.get("max_pixels"), DEFAULT_MAX_PIXELS, f"{path / 'zscore.json'}: max_pixels"),
        min_pixels=_whole(images.get("min_pixels") or size.get("shortest_edge"), 65_536, f"{path}: {cut}: min_pixels"),
        patch=_whole(images.get("patch_size"), 16, f"{path}: {cut}: patch_size"),
        merge=_whole(images.get("merge_size"), 2, f"{path}: {cut}: merge_size"),
        max_tokens=_whole(
            text.get("max_position_embeddings"), 32_768, f"{path / 'config.json'}: max_position_embeddings"
        ),
        trained=str(ours.get("trained", "not said (no zscore.json)")),
    )


def _whole(value: object, default: int, where: str) -> int:
    """A positive whole number of a JSON file, or the default where it says nothing."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{where} is {value!r}; a whole number of at least 1 is wanted")
    return value


def has_weights(path: Path) -> bool:
    """Whether the weights are there, or only the small files beside them."""
    return any(path.glob("*.safetensors"))


def weights_hash(path: Path) -> str:
    """Identity of the weights: sha256 over the safetensors files, in name order.

    Files over 1 GiB in all are hashed by size and evenly spaced samples; the prefix says which.
    """
    files = sorted(path.glob("*.safetensors"))
    sampled = sum(file.stat().st_size for file in files) > FULL_HASH_BYTES
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            for offset in _offsets(size, sampled=sampled):
                stream.seek(offset)
                digest.update(stream.read(SAMPLE_BYTES))
    return f"{'sha256-sampled' if sampled else 'sha256'}:{digest.hexdigest()}"


def _offsets(size: int, *, sampled: bool) -> range:
    step = max(size // SAMPLES_PER_FILE, SAMPLE_BYTES) if sampled else SAMPLE_BYTES
    return range(0, size, step)


def _image_processor(path: Path) -> dict[str, Any]:
    """The image processor's settings; newer checkpoints nest them in processor_config.json."""
    nested = _read_json(path / "processor_config.json").get("image_processor")
    return _read_json(path / "preprocessor_config.json") or cast("dict[str, Any]", nested or {})


def read_normalization(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, for pixels in [0, 1], that the vision tower was trained with."""
    images = _image_processor(path)
    half = (0.5, 0.5, 0.5)
    return tuple(images.get("image_mean") or half), tuple(images.get("image_std") or half)


def _read_json(file: Path, *, required: bool = False) -> dict[str, Any]:
    if not file.exists() and not required:
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing: a model is a Hugging Face folder with a {file.name}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} holds a {type(data).__name__}; a JSON object is wanted")
    return data


def model_from_environment() -> str | None:
    """`ZSCORE_MODEL`, or None."""
    return os.environ.get("ZSCORE_MODEL") or None
