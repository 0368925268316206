"""What updates the parameters: AdamW, or Muon for the matrices and AdamW for the rest.

Muon (momentum made orthogonal by Newton-Schulz steps) moves all directions of a matrix alike, also those that have
small gradients yet; a small body that is trained from scratch gets off its plateaus in far fewer steps. Its rate is
matched to AdamW's, so that one learning rate serves both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from zscore.errors import UsageError
from zscore_trainers import parallel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.nn import Module, Parameter

OptimizerName = Literal["adamw", "muon"]
TABLES = ("embed_tokens", "lm_head", "pos_embed")
"""Rows of these belong to one token or place each; they aren't matrices that something is multiplied by as a whole."""


def make_optimizers(
    policy: Module, name: OptimizerName, *, betas: tuple[float, float], weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Over all parameters that are trained, each in one; the learning rate is set step by step.

    Vectors (norms, biases) don't decay. Fused, AdamW makes no copies of a table; the plain one makes two at a time
    (benchmarks/risd_memory.py).

    Raises:
        UsageError: Muon over several ranks, which share the matrices out.
    """
    trained = [(key, one) for key, one in policy.named_parameters() if one.requires_grad]
    if name == "adamw":
        return [_adamw([one for _, one in trained], betas, weight_decay)]
    if parallel.is_started():
        raise UsageError("optimizer is 'muon', which wants whole matrices in one process: set optimizer=adamw")
    matrices = [one for key, one in trained if one.ndim == 2 and not any(table in key for table in TABLES)]
    chosen = {id(one) for one in matrices}
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, _adamw([one for _, one in trained if id(one) not in chosen], betas, weight_decay)]


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Of the next step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def _adamw(parameters: Sequence[Parameter], betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": weight_decay},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=betas, fused=True)
