"""Prompts with the outputs that follow them, as sequences to learn from: where the output's tokens and its score stand.

EnginePrompt + Written → EnginePrompt with the output behind it, its probe before the score → Collator.pad
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from zscore.records import EnginePrompt
    from zscore.rubrics.rubric import Rubric
    from zscore.templates import PromptBuilder
    from zscore_trainers.data import Padding
    from zscore_trainers.policy import PolicyBatch, ScorePolicy


@dataclass(frozen=True, slots=True)
class Written:
    """An output: sampled, or given as data."""

    tokens: tuple[int, ...]
    score_at: int | None
    """Position of the score token in it; None where it has no score."""


@dataclass(frozen=True, slots=True)
class OutputBatch:
    """Sequences of prompts and outputs. Shape suffixes: B sequences, T tokens."""

    policy: PolicyBatch
    """One probe a sequence: before the score, or -1."""
    output_BT: Tensor
    """True where a token is of the output."""
    score_BT: Tensor
    """True at the score token."""


def with_output(prompt: EnginePrompt, written: Written) -> EnginePrompt:
    """The prompt with an output behind it; its only probe is read before the score token."""
    probe = -1 if written.score_at is None else len(prompt.token_ids) + written.score_at - 1
    return replace(prompt, token_ids=(*prompt.token_ids, *written.tokens), probes=(probe,))


def collate(pad: Padding, pairs: Sequence[tuple[EnginePrompt, Written]]) -> OutputBatch:
    """Sequences of prompts with their outputs."""
    batch = pad([with_output(prompt, written) for prompt, written in pairs])
    output_BT = torch.zeros_like(batch.tokens_BT, dtype=torch.bool)
    score_BT = torch.zeros_like(output_BT)
    for row, (prompt, written) in enumerate(pairs):
        start = len(prompt.token_ids)
        output_BT[row, start : start + len(written.tokens)] = True
        if written.score_at is not None:
            score_BT[row, start + written.score_at] = True
    return OutputBatch(batch, output_BT, score_BT)


def given(builder: PromptBuilder, rubric: Rubric, reasoning: str, level: int) -> Written:
    """An output as the model should write it: the reasoning, the marker, the level token."""
    words = builder.encode(f"{reasoning.strip()} {rubric.reasoning_marker}")
    return Written((*words, builder.level_ids[level]), len(words))


def read_outputs(policy: ScorePolicy, batch: OutputBatch, width: int) -> tuple[Tensor, Tensor]:
    """Score logits (B, K), 0 without a score, and log-probabilities of the outputs' tokens, (B, width)."""
    device = next(policy.parameters()).device
    found = policy(batch.policy.to(device))
    logits_BK = found.score_logits_BDK[:, 0]
    has_score_B1 = (batch.policy.probes_BD >= 0).to(device)
    return torch.where(has_score_B1, logits_BK, 0), at_left(found.logprob_BT, batch, width)


def at_left(values_BT: Tensor, batch: OutputBatch, width: int) -> Tensor:
    """The outputs' part of each row, at the left; zeros (False) behind it."""
    output_BT = batch.output_BT.to(values_BT.device)
    start_B1 = output_BT.int().argmax(-1, keepdim=True)
    at_BW = start_B1 + torch.arange(width, device=values_BT.device)
    within_BW = at_BW < (start_B1 + output_BT.sum(-1, keepdim=True))
    picked_BW = values_BT.gather(1, at_BW.clamp(max=values_BT.shape[1] - 1))
    return torch.where(within_BW, picked_BW, torch.zeros((), dtype=values_BT.dtype, device=values_BT.device))


def token_logprobs(policy: ScorePolicy, batch: OutputBatch, width: int) -> Tensor:
    """Log-probabilities of the outputs' tokens, (B, width), without gradient."""
    with torch.no_grad():
        return read_outputs(policy, batch, width)[1]
