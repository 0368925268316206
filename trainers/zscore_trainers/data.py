"""Training samples: pictures, prompts and what is to be learned of them; batches in an order that resumes exactly.

    shards ── collect ──► PictureFile ─┐
    scores or labels ── targets ───────┴─► TrainSet ── Order ──► indices ── Collator ──► PolicyBatch, targets

Which samples make a batch depends on the seed and the step's number alone; so nothing has to be saved to go on.

Shape suffixes: N samples, B sequences of a batch, D dimensions, K levels.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from zscore.checkpoint import read_normalization
from zscore.errors import SampleError
from zscore.records import Failure
from zscore_trainers.policy import PolicyBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from zscore.checkpoint import Checkpoint
    from zscore.patches import PixelOptions
    from zscore.records import EnginePrompt, Sample
    from zscore.templates import PromptBuilder
    from zscore_trainers.pictures import PictureFile, Place

DECODERS = 4
"""Threads: the decoders release the interpreter's lock."""


@dataclass(frozen=True, slots=True)
class TrainSet:
    """Samples with their targets."""

    samples: Sequence[Sample]
    """Without their bytes."""
    places: Sequence[Place]
    targets_NDK: NDArray[np.float32]
    """Distributions over the levels; NaN where a dimension has none."""

    def __post_init__(self) -> None:
        """Refuse an empty set, and lengths that differ."""
        if not len(self.samples):
            raise ValueError("no samples: nothing to train on")
        if not len(self.samples) == len(self.places) == len(self.targets_NDK):
            raise ValueError(
                f"{len(self.samples)} samples, {len(self.places)} pictures, {len(self.targets_NDK)} targets"
            )


@dataclass(frozen=True, slots=True)
class Order:
    """Passes over a set, each shuffled by itself."""

    count: int
    """Samples of the set."""
    batch: int
    """Samples a step, over all ranks."""
    seed: int = 0

    def indices(self, step: int) -> NDArray[np.int64]:
        """The samples of a step, (batch,); a batch may lie across two passes."""
        wanted = np.arange(step * self.batch, (step + 1) * self.batch)
        passes, within = np.divmod(wanted, self.count)
        orders = {int(number): self._shuffled(int(number)) for number in np.unique(passes)}
        return np.array([orders[number][at] for number, at in zip(passes.tolist(), within.tolist(), strict=True)])

    def share(self, step: int, rank: int, ranks: int) -> list[int]:
        """One rank's part of a step's batch."""
        return [int(number) for number in self.indices(step)[rank::ranks]]

    def repeats(self, step: int, rank: int, ranks: int) -> list[int]:
        """How often each of a rank's part came before in the whole batch, as where the set is smaller than it."""
        seen: Counter[int] = Counter()
        found = []
        for number in self.indices(step).tolist():
            found.append(seen[number])
            seen[number] += 1
        return found[rank::ranks]

    def check_ranks(self, ranks: int) -> None:
        """Refuse a batch that the ranks can't share evenly.

        Raises:
            ValueError: names both.
        """
        if self.batch % ranks:
            raise ValueError(f"a batch of {self.batch} can't be shared by {ranks} ranks")

    def _shuffled(self, number: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, number)).permutation(self.count)


@dataclass(frozen=True, slots=True)
class Padding:
    """Makes sequences of prompts, their pictures scaled as the checkpoint's own processor does."""

    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    temporal: int
    """Slices that a picture is repeated to (temporal_patch_size)."""
    dtype: torch.dtype

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Padding:
        """That of a checkpoint."""
        return cls(*read_normalization(checkpoint.path), temporal=2, dtype=dtype)

    def __call__(self, prompts: Sequence[EnginePrompt]) -> PolicyBatch:
        """Right-padded sequences; every prompt has as many probes."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt.token_ids)] = torch.tensor(prompt.token_ids)
            mask_BT[row, : len(prompt.token_ids)] = 1
        patches_NCPP = torch.from_numpy(np.concatenate([prompt.pixels.patches_NCPP for prompt in prompts])).float()
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean_C, self.std_C))
        scaled_NCPP = ((patches_NCPP / 255 - mean) / std).to(self.dtype)
        return PolicyBatch(
            tokens_BT=tokens_BT,
            mask_BT=mask_BT,
            pixels_NX=scaled_NCPP.unsqueeze(2).expand(-1, -1, self.temporal, -1, -1).flatten(1),
            grid_B3=torch.tensor([(1, *prompt.pixels.grid) for prompt in prompts]),
            probes_BD=torch.tensor([prompt.probes for prompt in prompts]),
        )


@dataclass(frozen=True, slots=True)
class Collator:
    """Turns samples into padded sequences of the student's serving layout."""

    train: TrainSet
    pictures: PictureFile
    builder: PromptBuilder
    pixels: PixelOptions
    pad: Padding
    """Prompts → sequences."""

    @classmethod
    def of(
        cls,
        train: TrainSet,
        pictures: PictureFile,
        checkpoint: Checkpoint,
        builder: PromptBuilder,
        pixels: PixelOptions,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Collator:
        """The collator that cuts and scales pictures as the checkpoint's own processor does."""
        return cls(train, pictures, builder, pixels, Padding.of(checkpoint, dtype))

    def __call__(self, indices: Sequence[int]) -> tuple[PolicyBatch, torch.Tensor]:
        """Sequences of these samples and their targets, (B, probes, K).

        Raises:
            SampleError: a picture or a prompt that can't be used; names the sample.
        """
        prompts = [prompt for found in self.prompts(indices) for prompt in found]
        targets_NDK = torch.from_numpy(self.train.targets_NDK[np.asarray(indices)])
        probes = len(prompts[0].probes)
        return self.pad(prompts), targets_NDK.reshape(len(prompts), probes, -1)

    def prompts(self, indices: Sequence[int]) -> list[list[EnginePrompt]]:
        """The prompts of each of these samples: one, or one a dimension.

        Raises:
            SampleError: a picture or a prompt that can't be used; names the sample.
        """
        with ThreadPoolExecutor(DECODERS) as pool:
            return list(pool.map(self._prompts, indices))

    def _prompts(self, index: int) -> list[EnginePrompt]:
        sample = self.train.samples[index]
        found = self.pictures.read(self.train.places[index], self.pixels)
        prompts = found if isinstance(found, Failure) else self.builder.build(sample.prompt, found)
        if isinstance(prompts, Failure):
            raise SampleError(
                f"sample {sample.index} ('{sample.key}') of {sample.shard}: {prompts.error}; leave it out of --data"
            )
        return prompts
