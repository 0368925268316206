"""A student as a differentiable reward (paper, section 5.1): pixels → expected scores → one number (eq. 20).

    reward = Reward.open("run/model")
    (-reward(prompts, generator(prompts))).mean().backward()

Preprocessing is the student's own, written in differentiable operations: antialiased bicubic resize, patches in the
vision tower's order, scaling. The student is frozen; gradients reach the pixels only.

Shape suffixes: B pictures, C = 3, H and W pixels, D dimensions, N patches, P patch edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from zscore._torchvision import ensure_importable
from zscore.checkpoint import read_checkpoint, read_normalization
from zscore.errors import ModelError, UsageError
from zscore.patches import PixelOptions, target_size
from zscore.records import Failure, Pixels
from zscore.rubrics.rubric import load_rubric
from zscore.templates import PromptBuilder
from zscore_trainers.policy import PolicyBatch, ScorePolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def mean_score(mu_BD: Tensor) -> Tensor:
    """All dimensions alike."""
    return mu_BD.mean(-1)


def weighted(weights: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """A weighted mean of the dimensions, in the rubric's order."""

    def aggregate(mu_BD: Tensor) -> Tensor:
        weights_D = mu_BD.new_tensor(list(weights))
        return mu_BD @ (weights_D / weights_D.sum())

    return aggregate


def weakest(mu_BD: Tensor, sharpness: float = 4.0) -> Tensor:
    """A smooth minimum: what is worst counts most, so that no dimension is given up for another."""
    return -(-sharpness * mu_BD).logsumexp(-1) / sharpness


@dataclass(frozen=True, slots=True)
class _Scale:
    """How the vision tower wants pixels."""

    options: PixelOptions
    mean_C11: Tensor
    std_C11: Tensor
    temporal: int


class Reward(nn.Module):
    """A frozen student; see the module's text.

    Args:
        policy: the student.
        builder: of its prompts, joint layout.
        values: what its levels are worth.
        scale: how its vision tower wants pixels.
        aggregate: expected scores mu_BD → rewards, (B,): the A of eq. 20.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(
        self,
        policy: ScorePolicy,
        builder: PromptBuilder,
        values: Sequence[float],
        scale: _Scale,
        aggregate: Callable[[Tensor], Tensor] = mean_score,
    ) -> None:
        super().__init__()
        self.policy = policy.eval().requires_grad_(requires_grad=False)
        self.aggregate = aggregate
        self._builder = builder
        self._scale = scale
        self.register_buffer("values_K", torch.tensor(list(values)), persistent=False)
        self.register_buffer("mean_C11", scale.mean_C11, persistent=False)  # so that it follows to another device
        self.register_buffer("std_C11", scale.std_C11, persistent=False)

    @classmethod
    def open(
        cls,
        model: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        aggregate: Callable[[Tensor], Tensor] = mean_score,
    ) -> Self:
        """The reward of a checkpoint that says its rubric in `zscore.json`.

        Raises:
            ModelError: it can't be loaded, or wasn't trained to score in the joint layout.
        """
        ensure_importable()
        from transformers import AutoModelForImageTextToText

        checkpoint = read_checkpoint(model)
        if checkpoint.rubric is None or checkpoint.layout != "joint":
            raise ModelError(
                f"{model} isn't a student of the joint layout: its zscore.json has to say rubric and layout"
            )
        rubric = load_rubric(checkpoint.rubric)
        builder = PromptBuilder(
            checkpoint.path, rubric, "joint", merge=checkpoint.merge, max_tokens=checkpoint.max_tokens
        )
        network = AutoModelForImageTextToText.from_pretrained(checkpoint.path, dtype=dtype, local_files_only=True)
        mean, std = (torch.tensor(one, device=device)[:, None, None] for one in read_normalization(checkpoint.path))
        options = PixelOptions(
            patch=checkpoint.patch,
            merge=checkpoint.merge,
            min_pixels=min(checkpoint.min_pixels, checkpoint.max_pixels),
            max_pixels=checkpoint.max_pixels,
        )
        temporal = int(getattr(network.config.vision_config, "temporal_patch_size", 2))
        policy = ScorePolicy(network, builder.level_ids)
        made = cls(policy, builder, rubric.values, _Scale(options, mean, std, temporal), aggregate)
        return made.to(device)

    def forward(self, prompts: Sequence[str], pictures_BCHW: Tensor) -> Tensor:
        """Rewards, (B,), differentiable in the pictures."""
        return self.aggregate(self.scores(prompts, pictures_BCHW))

    def scores(self, prompts: Sequence[str], pictures_BCHW: Tensor) -> Tensor:
        """Expected scores mu (eq. 16), (B, D).

        Args:
            prompts: one a picture.
            pictures_BCHW: RGB in [0, 1]; values outside are cut off, and get no gradient.

        Raises:
            UsageError: numbers or shapes that don't fit, or a prompt that is too long.
        """
        if pictures_BCHW.ndim != 4 or pictures_BCHW.shape[1] != 3 or len(prompts) != len(pictures_BCHW):
            raise UsageError(
                f"{len(prompts)} prompts for pictures of shape {tuple(pictures_BCHW.shape)}: (B, 3, H, W) is wanted"
            )
        patches_BNX, grid = self._patches(pictures_BCHW)
        batch = self._batch(prompts, patches_BNX, grid)
        probs_BDK = self.policy(batch, with_logprobs=False).score_logits_BDK.softmax(-1)
        mu_BD: Tensor = probs_BDK @ self.values_K.to(probs_BDK)
        return mu_BD

    def _patches(self, pictures_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """As `zscore.patches.cut` and the tower's processor, up to rounding to whole levels."""
        options, scale = self._scale.options, self._scale
        size = target_size(int(pictures_BCHW.shape[2]), int(pictures_BCHW.shape[3]), options)
        if isinstance(size, Failure):
            raise UsageError(size.error)
        if size != tuple(pictures_BCHW.shape[2:]):
            pictures_BCHW = nn.functional.interpolate(
                pictures_BCHW, size=size, mode="bicubic", antialias=True, align_corners=False
            )
        scaled = (pictures_BCHW.clamp(0, 1) - self.mean_C11) / self.std_C11
        rows, columns = (edge // options.factor for edge in size)
        blocks = scaled.reshape(
            len(scaled), 3, rows, options.merge, options.patch, columns, options.merge, options.patch
        ).permute(0, 2, 5, 3, 6, 1, 4, 7)
        patches_BNCPP = blocks.reshape(len(scaled), -1, 3, options.patch, options.patch)
        repeated = patches_BNCPP.unsqueeze(3).expand(-1, -1, -1, scale.temporal, -1, -1)
        return repeated.flatten(2), (size[0] // options.patch, size[1] // options.patch)

    def _batch(self, prompts: Sequence[str], patches_BNX: Tensor, grid: tuple[int, int]) -> PolicyBatch:
        empty = Pixels(torch.empty(0, 3, 1, 1, dtype=torch.uint8).numpy(), grid, 0, 0)
        built = []
        for prompt in prompts:
            made = self._builder.build(prompt, empty)
            if isinstance(made, Failure):
                raise UsageError(made.error)
            built.append(made[0])
        longest = max(len(one.token_ids) for one in built)
        tokens = torch.zeros(len(built), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, one in enumerate(built):
            tokens[row, : len(one.token_ids)] = torch.tensor(one.token_ids)
            mask[row, : len(one.token_ids)] = 1
        device = patches_BNX.device
        return PolicyBatch(
            tokens_BT=tokens.to(device),
            mask_BT=mask.to(device),
            pixels_NX=patches_BNX.flatten(0, 1).to(next(self.policy.parameters()).dtype),
            grid_B3=torch.tensor([(1, *grid)] * len(built), device=device),
            probes_BD=torch.tensor([one.probes for one in built], device=device),
        )
