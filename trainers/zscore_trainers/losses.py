"""The paper's objectives as pure tensor functions; no model, no state (arXiv paper "Beyond Scalar Rewards", eqs. 2-19).

Score distributions come in as logits over the K level tokens. Everything is computed in the logits' dtype: give
float32 or better.

Shape suffixes: P pairs of pictures for one prompt, J = 2 sides (winner, loser), G outputs sampled a side, K score
levels, T tokens, N samples of any kind. `valid` marks outputs that reached a score: one that didn't has no
distribution, so it takes no part in any mean, sum or cross pair below, and gets the lowest reward there is.

Where the paper is silent: the standard deviation of eq. 3 is that of the population; means over outputs are over the
valid ones (2G of them where all are); a batch's loss is the mean over its pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]

LOWEST_POINTWISE = 0.0
"""Least value of eq. 7: the expected score is as far off as the range allows."""
LOWEST_PAIRWISE = -1.0
"""Least value of eq. 10: the gap is as wide as it can be, with the wrong sign."""


def score_distribution(logits: Tensor) -> Tensor:
    """Eq. 1: q over the levels, at temperature 1; (..., K) → (..., K)."""
    return logits.softmax(-1)


def expected_score(logits: Tensor, values_K: Tensor) -> Tensor:
    """Eqs. 2, 6 and 16: mu, the mean of q; (..., K) → (...)."""
    return score_distribution(logits) @ values_K.to(logits)


def label_targets(scores: Tensor, values_K: Tensor) -> Tensor:
    """What a distribution is trained towards: one-hot on a level, two-hot between two, with the label as its mean.

    Args:
        scores: labels on the rubric's scale, (...).
        values_K: what the levels are worth, ascending.

    Returns:
        Distributions, (..., K).

    Raises:
        ValueError: a label is beyond the scale or isn't a number.
    """
    if not bool(((scores >= values_K[0]) & (scores <= values_K[-1])).all()):
        raise ValueError(f"a label is outside {float(values_K[0]):g} to {float(values_K[-1]):g}")
    values_K = values_K.to(scores)
    upper = torch.searchsorted(values_K, scores.contiguous()).clamp(1, len(values_K) - 1)
    low, high = values_K[upper - 1], values_K[upper]
    weight = (scores - low) / (high - low)
    targets = scores.new_zeros((*scores.shape, len(values_K)))
    targets.scatter_(-1, (upper - 1).unsqueeze(-1), (1 - weight).unsqueeze(-1))
    return targets.scatter_(-1, upper.unsqueeze(-1), weight.unsqueeze(-1))


def group_advantages(rewards: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Eq. 3: rewards against their own group's mean and standard deviation; (..., G) → (..., G), without gradient."""
    exact = rewards.detach().double()  # in float32, equal rewards would differ from their mean by as much as epsilon
    mean = exact.mean(-1, keepdim=True)
    return ((exact - mean) / (exact.std(-1, correction=0, keepdim=True) + epsilon)).to(rewards)


def pointwise_reward(mu_PJG: Tensor, label_PJ: Tensor, score_range: float, valid_PJG: Tensor | None = None) -> Tensor:
    """Eq. 7: 1 where the expected score is the label, 0 where it is the whole range away; (P, J, G)."""
    reward = 1 - (mu_PJG - label_PJ.unsqueeze(-1)).abs() / score_range
    return reward if valid_PJG is None else torch.where(valid_PJG, reward, LOWEST_POINTWISE)


def pairwise_reward(mu_PJG: Tensor, label_PJ: Tensor, score_range: float, valid_PJG: Tensor | None = None) -> Tensor:
    """Eq. 10: how well an output's gaps to the other side's outputs meet the annotated gap; (P, J, G).

    Where the other side has no valid output there is no gap to meet: the reward is 1 for every valid one alike, which
    the advantages cancel.
    """
    error_PJGG = _gap_errors(mu_PJG, label_PJ)
    if valid_PJG is None:
        return 1 - error_PJGG.mean(-1) / score_range
    others_PJ1G = valid_PJG.flip(1).unsqueeze(2)
    mean_PJG = torch.where(others_PJ1G, error_PJGG, 0).sum(-1) / others_PJ1G.sum(-1).clamp(min=1)
    return torch.where(valid_PJG, 1 - mean_PJG / score_range, LOWEST_PAIRWISE)


def gdso_reward(pointwise: Tensor, pairwise: Tensor, *, lambda_pt: float, lambda_pw: float) -> Tensor:
    """Eq. 13: the reward of the policy gradient."""
    return lambda_pt * pointwise + lambda_pw * pairwise


def pointwise_loss(logits_PJGK: Tensor, target_PJK: Tensor, valid_PJG: Tensor | None = None) -> Tensor:
    """Eq. 8: cross-entropy of every sampled distribution with its side's label; a scalar."""
    cross_PJG = -(target_PJK.unsqueeze(2) * logits_PJGK.log_softmax(-1)).sum(-1)
    return _mean_over_outputs(cross_PJG, valid_PJG)


def pairwise_loss(mu_PJG: Tensor, label_PJ: Tensor, score_range: float, valid_PJG: Tensor | None = None) -> Tensor:
    """Eq. 11: errors of the score gaps over all G x G cross pairs, from both sides; a scalar."""
    error_PJGG = _gap_errors(mu_PJG, label_PJ) / score_range
    pairs = None if valid_PJG is None else valid_PJG.unsqueeze(-1) & valid_PJG.flip(1).unsqueeze(2)
    return _mean_over_outputs(error_PJGG.flatten(2), None if pairs is None else pairs.flatten(2))


def bradley_terry_loss(mu_winner: Tensor, mu_loser: Tensor) -> Tensor:
    """Eq. 12, which GDSO doesn't use: it only asks the winner to be ahead, however far; a scalar."""
    return -torch.nn.functional.logsigmoid(mu_winner - mu_loser).mean()


def _gap_errors(mu_PJG: Tensor, label_PJ: Tensor) -> Tensor:
    """|(mu of mine - mu of theirs) - annotated gap| (eq. 9) for all cross pairs, (P, J, G, G)."""
    gap_PJ = label_PJ - label_PJ.flip(1)
    mine, theirs = mu_PJG.unsqueeze(-1), mu_PJG.flip(1).unsqueeze(2)
    return (mine - theirs - gap_PJ[..., None, None]).abs()


def _mean_over_outputs(values_PJX: Tensor, valid_PJX: Tensor | None) -> Tensor:
    """Mean inside each pair over what is valid, then over the pairs that have anything."""
    if valid_PJX is None:
        return values_PJX.mean()
    count_P = valid_PJX.sum((1, 2))
    # where, not a product: what is invalid may be NaN
    mean_P = torch.where(valid_PJX, values_PJX, 0).sum((1, 2)) / count_P.clamp(min=1)
    return mean_P.sum() / (count_P > 0).sum().clamp(min=1)


def importance_weights(logprob: Tensor, sampled_logprob: Tensor, most: float) -> Tensor:
    """How much likelier a token is to the trainer than it was to the rollout engine, cut off at `most`; no gradient."""
    ratio: Tensor = (logprob - sampled_logprob).detach().exp()
    return ratio.clamp(max=most)


def policy_gradient_loss(
    logprob_NT: Tensor, advantage: Tensor, mask_NT: Tensor, weight_NT: Tensor | None = None
) -> Tensor:
    """First term of eq. 4: -A times the log-probability of an output, summed over its tokens, mean over outputs.

    Args:
        logprob_NT: of the sampled tokens, with gradient.
        advantage: (N,) or (N, T); taken as a constant.
        mask_NT: tokens that count.
        weight_NT: importance weights; none is 1.
    """
    advantage_NT = (advantage if advantage.ndim == logprob_NT.ndim else advantage.unsqueeze(-1)).detach()
    weighted_NT = advantage_NT * logprob_NT if weight_NT is None else advantage_NT * weight_NT * logprob_NT
    return -torch.where(mask_NT, weighted_NT, 0).sum(-1).mean()


def kl_penalty(logprob_NT: Tensor, reference_NT: Tensor, mask_NT: Tensor, estimator: KlEstimator = "k3") -> Tensor:
    """Second term of eq. 4 without beta: KL(policy || reference) from sampled tokens, summed over them; a scalar.

    k1 and k3 are unbiased in value, k3 is never negative, k2 is half the square of the log ratio (Schulman,
    "Approximating KL divergence", 2020). Of their gradients over the policy's own samples, k1's has mean zero, k2's is
    that of KL(policy || reference), and k3's is that of KL(reference || policy).
    """
    log_ratio = reference_NT - logprob_NT
    if estimator == "k1":
        found_NT = -log_ratio
    elif estimator == "k2":
        found_NT = log_ratio**2 / 2
    else:
        found_NT = log_ratio.expm1() - log_ratio
    return torch.where(mask_NT, found_NT, 0).sum(-1).mean()


def risd_loss(teacher_NK: Tensor, logits_NK: Tensor) -> Tensor:
    """Eq. 15: KL(teacher || student) over the levels; a scalar.

    The reference form: training takes `zscore_kernels.score_head_kl`, which computes the same from hidden states in
    one launch and is tested against this one, value and gradients.
    """
    entropy_N: Tensor = torch.special.entr(teacher_NK).sum(-1)
    cross_N = -(teacher_NK * logits_NK.log_softmax(-1)).sum(-1)
    return (cross_N - entropy_N).mean()


def mass_loss(log_mass_N: Tensor) -> Tensor:
    """-log of the share of the next token's probability that lies on the level tokens, which eq. 15 doesn't see."""
    return -log_mass_N.mean()


def opd_advantages(teacher_NT: Tensor, student_NT: Tensor) -> Tensor:
    """Eq. 18: how much likelier a token of the student's own output is to the teacher; without gradient.

    With log-probabilities of the policy that sampled, this is the paper's; with the live policy's, the advantage
    follows the student within a step.
    """
    return (teacher_NT - student_NT).detach()


def opd_loss(logprob_NT: Tensor, advantage_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Eq. 19: policy gradient with one advantage a token, mean over an output's tokens, then over outputs."""
    length_N = mask_NT.sum(-1).clamp(min=1)
    weighted_NT = torch.where(mask_NT, advantage_NT.detach() * logprob_NT, 0)
    return -(weighted_NT.sum(-1) / length_N).mean()
