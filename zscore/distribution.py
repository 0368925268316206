"""Hidden states at the probes → level distributions, and their wire format between device and host.

One probe travels as K + 3 float32 numbers: probabilities, mean, standard deviation, entropy. The arithmetic is
`zscore_kernels.score_head`, which takes the Triton kernel on a GPU and its torch reference elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from zscore.records import Failure, LevelScores, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

# Legend: B probes of any number of prompts, H hidden size, K levels, D probes of one prompt, W = K + 3.
EXTRA = 3


def score_probes(hidden_BH: torch.Tensor, weight_KH: torch.Tensor, values_K: torch.Tensor) -> torch.Tensor:
    """Level distributions of B probes, packed.

    Args:
        hidden_BH: last hidden states at the probes, after the final norm; float32, bfloat16 or float16.
        weight_KH: rows of the output projection for the K level tokens, in the checkpoint's dtype.
        values_K: level values in rubric units, float32.

    Returns:
        Float32 tensor of shape (B, K + 3): probabilities, mean, standard deviation, entropy in nats (paper eq. 2).
    """
    import torch

    from zscore_kernels import score_head

    head = score_head(hidden_BH, weight_KH, values_K)
    return torch.cat([head.probs_BK, torch.stack([head.mean_B, head.var_B.sqrt(), head.entropy_B], dim=1)], dim=1)


def unpack(packed_DW: NDArray[np.float32]) -> LevelScores | Failure:
    """Scores of one prompt from its packed probes; a NaN or infinity anywhere is a failure, never a row."""
    if not np.isfinite(packed_DW).all():
        return Failure(
            Status.NONFINITE_SCORE, "the model gave NaN or infinite scores for this picture: try --dtype float32"
        )
    return LevelScores(
        probs_DK=packed_DW[:, :-EXTRA],
        mean_D=packed_DW[:, -EXTRA],
        std_D=packed_DW[:, -2],
        entropy_D=packed_DW[:, -1],
    )


def combine(parts: Sequence[LevelScores | Failure]) -> LevelScores | Failure:
    """Scores of a sample from all its prompts' results, or the first failure among them."""
    failure = next((part for part in parts if isinstance(part, Failure)), None)
    return failure or stack([part for part in parts if isinstance(part, LevelScores)])


def stack(parts: list[LevelScores]) -> LevelScores:
    """Scores of a sample from its separate prompts, in dimension order."""
    if len(parts) == 1:
        return parts[0]
    return LevelScores(
        probs_DK=np.concatenate([part.probs_DK for part in parts]),
        mean_D=np.concatenate([part.mean_D for part in parts]),
        std_D=np.concatenate([part.std_D for part in parts]),
        entropy_D=np.concatenate([part.entropy_D for part in parts]),
    )
