"""The reference engine: Hugging Face transformers, on whatever device torch has.

Runs the body without its output projection and reads the hidden states at the probes, so that logits over the
vocabulary never exist: memory is [B, T, H], not [B, T, V]. Batches are right-padded, which is exact for the
gated delta net as well as for attention (left padding is not: its recurrence would see the pads first).
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zscore._torchvision import ensure_importable
from zscore.checkpoint import read_normalization
from zscore.distribution import score_probes, unpack
from zscore.errors import EngineError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from zscore.records import EnginePrompt, Failure, LevelScores

# Legend: B prompts, T tokens, H hidden, K levels, N patches of all pictures, P patch edge, S temporal patch (2).


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersConfig:
    """Settings of `TransformersEngine`."""

    dtype: str = "auto"
    """Of the weights: float32, bfloat16, or auto (bfloat16 on a GPU, float32 elsewhere)."""
    device: str = "auto"
    """A torch device, or auto (the first GPU, else the CPU)."""
    batch_size: int = 4
    """Prompts a forward pass."""
    max_tokens: int = 16_384
    """Longest prompt it takes; the model's own limit counts too."""


class TransformersEngine:
    """Scores prompts with a transformers model (see `zscore.engines.base.Engine`)."""

    name = "transformers"
    lockstep = True

    def __init__(
        self,
        model: Path,
        *,
        level_token_ids: tuple[int, ...],
        level_values: tuple[float, ...],
        config: TransformersConfig | None = None,
    ) -> None:
        config = config or TransformersConfig()
        ensure_importable()
        import transformers

        self.version = transformers.__version__
        self._device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self._device)
        self._model = load_model(model, getattr(torch, self.dtype), self._device)
        self._body = self._model.model
        weight_VH = self._model.get_output_embeddings().weight
        if max(level_token_ids) >= weight_VH.shape[0]:
            raise ModelError(
                f"level token {max(level_token_ids)} is outside the model's vocabulary of {weight_VH.shape[0]}:"
                " the tokenizer and the weights don't belong together"
            )
        self._weight_KH = weight_VH[list(level_token_ids)].detach().clone()
        self._values_K = torch.tensor(level_values, dtype=torch.float32, device=self._device)
        text = self._model.config.get_text_config()
        self._image_token = int(self._model.config.image_token_id)
        self._scaling = Scaling(model, self._model.config, self._device, self._model.dtype)
        self.max_tokens = min(config.max_tokens, int(text.max_position_embeddings))
        self.max_in_flight = self._batch_size = config.batch_size
        self._queue: deque[tuple[int, EnginePrompt]] = deque()

    def submit(self, tag: int, prompt: EnginePrompt) -> None:
        """Queue one prompt."""
        self._queue.append((tag, prompt))

    def step(self) -> list[tuple[int, LevelScores | Failure]]:
        """Score the next `batch_size` prompts in the order they came."""
        batch = [self._queue.popleft() for _ in range(min(self._batch_size, len(self._queue)))]
        try:
            packed = self._forward([prompt for _, prompt in batch])
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"out of GPU memory on a batch of {len(batch)}: lower --batch-size (now {self._batch_size})"
                " or --max-pixels"
            ) from error
        return [(tag, unpack(probes)) for (tag, _), probes in zip(batch, packed, strict=True)]

    @torch.inference_mode()
    def _forward(self, prompts: list[EnginePrompt]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Packed probes of each prompt, (D, K + 3)."""
        tokens_BT, mask_BT = _pad([prompt.token_ids for prompt in prompts])
        pixels_NX = torch.cat([self._scaling(prompt) for prompt in prompts])
        grids = torch.tensor([(1, *prompt.pixels.grid) for prompt in prompts])
        output = self._body(
            input_ids=tokens_BT.to(self._device),
            attention_mask=mask_BT.to(self._device),
            mm_token_type_ids=(tokens_BT == self._image_token).int().to(self._device),
            pixel_values=pixels_NX,
            image_grid_thw=grids.to(self._device),
            use_cache=False,
        )
        rows = [row for row, prompt in enumerate(prompts) for _ in prompt.probes]
        columns = [position for prompt in prompts for position in prompt.probes]
        hidden_BH = output.last_hidden_state[rows, columns]
        packed = score_probes(hidden_BH, self._weight_KH, self._values_K).cpu().numpy()
        ends = np.cumsum([len(prompt.probes) for prompt in prompts])
        return np.split(packed, ends[:-1])

    def close(self) -> None:
        """Free the model."""
        self._queue.clear()
        self._model = self._body = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class Scaling:
    """Patches as the vision tower reads them: uint8 → (N, 3·S·P·P), scaled, the temporal slice repeated.

    Args:
        folder: of the checkpoint, for its mean and standard deviation.
        config: the model's.
        device, dtype: of the result.
    """

    def __init__(self, folder: Path, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        mean_C, std_C = read_normalization(folder)
        self._device, self._dtype = device, dtype
        self._mean_C11 = torch.tensor(mean_C, device=device)[:, None, None]
        self._std_C11 = torch.tensor(std_C, device=device)[:, None, None]
        self._temporal = int(getattr(config.vision_config, "temporal_patch_size", 2))

    def __call__(self, prompt: EnginePrompt) -> torch.Tensor:
        """Of one prompt's picture."""
        patches_NCPP = torch.from_numpy(prompt.pixels.patches_NCPP).to(self._device).float() / 255
        scaled_NCPP = ((patches_NCPP - self._mean_C11) / self._std_C11).to(self._dtype)
        return scaled_NCPP.unsqueeze(2).expand(-1, -1, self._temporal, -1, -1).flatten(1)


def pick_device(name: str) -> torch.device:
    """The device of that name; for auto the first GPU, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> str:
    """The dtype of that name; for auto bfloat16 on a GPU, float32 elsewhere."""
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" else "float32"


def load_model(model: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in eval mode; safetensors only, no code from the checkpoint.

    Raises:
        ModelError: transformers can't load it, or it isn't a Qwen-style vision-language model.
    """
    import transformers

    if not os.environ.get("ZSCORE_DEBUG"):  # its bars and hints would break into our own progress display
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    try:
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(
            model, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # safetensors, tokenizers and hub errors share no base
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"transformers can't load {model}: {line}") from error
    if not hasattr(loaded.config, "image_token_id") or not hasattr(loaded.config.vision_config, "spatial_merge_size"):
        raise ModelError(
            f"{model} is a {type(loaded).__name__}; the transformers engine scores Qwen-VL architectures"
            " (Qwen2-VL to Qwen3.5): use --engine vllm for others"
        )
    return loaded.eval().to(device)


def _pad(sequences: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and their attention mask, both (B, T)."""
    longest = max(map(len, sequences))
    tokens_BT = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)] = torch.tensor(sequence)
        mask_BT[row, : len(sequence)] = 1
    return tokens_BT, mask_BT
