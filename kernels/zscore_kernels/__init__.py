"""The score head: hidden states or logits → distribution over K levels, its mean, variance and entropy.

Triton on CUDA, plain torch elsewhere, picked by the device of the input. `backend_calls` counts what ran where.
"""

from zscore_kernels import reference
from zscore_kernels.launch import backend_calls
from zscore_kernels.reference import ScoreHead, ScoreHeadMass
from zscore_kernels.score_head import score_from_logits, score_head, score_head_kl

__all__ = [
    "ScoreHead",
    "ScoreHeadMass",
    "backend_calls",
    "reference",
    "score_from_logits",
    "score_head",
    "score_head_kl",
]
