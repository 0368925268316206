"""GRPO (eqs. 3 and 4) with rewards from labels (eqs. 7, 10 and 13), and what GDSO adds to it can be added to it.

    pairs → G rollouts a side → q recomputed by the policy → rewards → advantages → loss, by `two_pass`

The reward reads the mean of the distribution at the score (the paper's way), or the score as written (its ablation).
Where the paper is silent: an output without a score has the lowest reward; the policy gradient is summed over an
output's tokens and averaged over outputs. Two presets:

    paper    every token of the output counts, weights are 1, as eq. 4 is written
    stable   where the reward reads the distribution, the score token doesn't count (given the reasoning its reward is
             constant, so its gradient is noise; where it reads the text, the reward is that token's); and tokens are
             weighted by how much likelier they are to the trainer than to the generator, at most `most`

With `updates` K, algorithm 1's K_gdso, a batch of outputs serves K steps: rewards and advantages stay as the policy
that wrote had them, probabilities and direct losses follow the policy. Checkpoints lie between batches.

Each rank rolls out its share of the pairs; the loss is that of all of them, computed on every rank alike, for what a
pair counts depends on how many others have a score.

Shape suffixes: P pairs, J = 2 sides, G outputs a side, N = P x J x G, T tokens, K levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from zscore.errors import UsageError
from zscore_trainers import losses, parallel
from zscore_trainers.checks import check_least, check_one_of, check_positive
from zscore_trainers.pair_rollouts import PairRollouts
from zscore_trainers.sequences import read_outputs
from zscore_trainers.two_pass import two_pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from zscore_trainers.data import Order
    from zscore_trainers.pair_rollouts import Outputs, Sampled
    from zscore_trainers.pairs import Pair
    from zscore_trainers.policy import ScorePolicy
    from zscore_trainers.reference import Reference
    from zscore_trainers.rollouts import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoConfig:
    """What the paper leaves open is at our choice here."""

    batch_size: int = 8
    """Pairs a step, over all ranks."""
    group: int = 8
    """G: outputs a side."""
    micro_batch: int = 8
    """Sequences a forward pass."""
    lambda_pt: float = 1.0
    """Weight of the pointwise reward (eq. 7)."""
    lambda_pw: float = 1.0
    """Weight of the pairwise reward (eq. 10)."""
    beta: float = 0.01
    """Weight of the KL to the reference; 0 keeps none."""
    estimator: Literal["k2", "k3"] = "k3"
    """Of the KL: k2 pulls with the gradient of KL(policy || reference), k3 with that of KL(reference || policy)."""
    reference_every: int = 100
    """M: batches of outputs until the reference becomes the policy again."""
    updates: int = 1
    """K_gdso: steps of the optimizer on one batch of outputs; a step of the run is one of them."""
    reward_from: Literal["distribution", "text"] = "distribution"
    preset: Literal["stable", "paper"] = "stable"
    most: float = 2.0
    """Largest importance weight of the stable preset; inf lets all be."""
    max_tokens: int = 1024
    """Longest output."""

    def __post_init__(self) -> None:
        """Refuse settings that can't be meant.

        Raises:
            UsageError: names the setting.
        """
        known = {
            "estimator": ("k2", "k3"),
            "reward_from": ("distribution", "text"),
            "preset": ("stable", "paper"),
        }
        for name, values in known.items():
            check_one_of(name, getattr(self, name), values)
        if self.group < 2:
            raise UsageError(f"group is {self.group}: at least 2, for an output is measured against its group")
        check_least(self, 1, "batch_size", "micro_batch", "reference_every", "updates", "max_tokens")
        check_least(self, 0, "lambda_pt", "lambda_pw", "beta")
        if self.most != math.inf:
            check_positive(self, "most")


class Grpo:
    """Gradients of GRPO; see `zscore_trainers.engine.Algorithm`.

    Args:
        config: how.
        order: over the pairs.
        pairs: what to learn from.
        sampling: where outputs come from.
        reference: for the KL; None where beta is 0.

    Raises:
        ValueError: a batch that the ranks can't share, or no reference where one is wanted.
    """

    def __init__(
        self,
        config: GrpoConfig,
        order: Order,
        pairs: Sequence[Pair],
        sampling: Sampling,
        reference: Reference | None = None,
    ) -> None:
        order.check_ranks(sampling.ranks)
        if config.beta and reference is None:
            raise ValueError(f"beta is {config.beta}: a reference is wanted")
        self._config = config
        self.sampling = sampling
        self.rollouts = PairRollouts(
            sampling, order, pairs, group=config.group, micro_batch=config.micro_batch, reference=reference
        )
        self._values_K = torch.tensor(sampling.values)
        self._range = float(sampling.values[-1] - sampling.values[0])
        self.reference = reference
        self.period = config.updates
        self._outputs: Outputs | None = None

    def backward(self, policy: ScorePolicy, step: int) -> Mapping[str, float]:
        """Add the gradients of one batch of pairs; every `updates` steps it is a new one."""
        if self._outputs is None or step % self.period == 0:
            self._outputs = self.rollouts(policy, step // self.period)
        outputs = self._outputs
        logged: dict[str, float] = {}

        def loss(logits_NK: Tensor, logprob_NT: Tensor) -> Tensor:
            if outputs.advantage_N is None:
                outputs.advantage_N = self.advantages(outputs.sampled, logits_NK, outputs.logged)
            return self.loss(outputs.sampled, outputs.advantage_N, logits_NK, logprob_NT, logged)

        value = two_pass(
            lambda batch: read_outputs(policy, batch, outputs.width),
            outputs.batches,
            loss,
            order=outputs.order,
            group=parallel.group(),
        )
        return {"loss": float(value), **outputs.logged, **logged}

    def advantages(self, sampled: Sampled, logits_NK: Tensor, logged: dict[str, float]) -> Tensor:
        """Eq. 3 on the rewards of eq. 13, without a graph, (N,); fills `logged`."""
        config, device = self._config, logits_NK.device
        shape = (*sampled.label_PJ.shape, config.group)
        label_PJ, valid_PJG = sampled.label_PJ.to(device), sampled.valid_N.to(device).view(shape)
        score_PJG = sampled.text_N.to(device).view(shape)
        if config.reward_from == "distribution":
            score_PJG = losses.expected_score(logits_NK.detach(), self._values_K.to(device)).view(shape)
        reward_PJG = losses.gdso_reward(
            losses.pointwise_reward(score_PJG, label_PJ, self._range, valid_PJG),
            losses.pairwise_reward(score_PJG, label_PJ, self._range, valid_PJG),
            lambda_pt=config.lambda_pt,
            lambda_pw=config.lambda_pw,
        )
        logged["reward"] = float(reward_PJG.mean())
        logged["valid"] = float(valid_PJG.float().mean())
        valid_N = sampled.valid_N.to(device)
        if valid_N.any():
            apart_NK = logits_NK.detach().softmax(-1) - sampled.probs_NK.to(device)
            logged["score_drift"] = float(apart_NK[valid_N].abs().max())
            logged["mass"] = float(sampled.mass_N[sampled.valid_N].mean())
        logged["output_tokens"] = float(sampled.output_NT.sum(-1).float().mean())
        return losses.group_advantages(reward_PJG).flatten()

    def loss(
        self,
        sampled: Sampled,
        advantage_N: Tensor,
        logits_NK: Tensor,
        logprob_NT: Tensor,
        logged: dict[str, float],
    ) -> Tensor:
        """Eq. 4, and the direct losses; fills `logged`."""
        config, device = self._config, logits_NK.device
        shape = (*sampled.label_PJ.shape, config.group)
        label_PJ, valid_PJG = sampled.label_PJ.to(device), sampled.valid_N.to(device).view(shape)
        output_NT = sampled.output_NT.to(device)
        counts_NT, weight_NT = output_NT, None
        if config.preset == "stable":
            if config.reward_from == "distribution":
                counts_NT = output_NT & ~sampled.score_NT.to(device)
            weight_NT = losses.importance_weights(logprob_NT, sampled.sampled_NT.to(device), config.most)
        total = losses.policy_gradient_loss(logprob_NT, advantage_N, counts_NT, weight_NT)
        logged["drift"] = float(((logprob_NT.detach() - sampled.sampled_NT.to(device)).abs() * output_NT).max())
        if sampled.reference_NT is not None:
            divergence = losses.kl_penalty(logprob_NT, sampled.reference_NT, output_NT, config.estimator)
            logged["kl"] = float(divergence.detach())
            total = total + config.beta * divergence
        mu_PJG = losses.expected_score(logits_NK, self._values_K.to(device)).view(shape)
        return total + self.direct(logits_NK.view(*shape, -1), mu_PJG, label_PJ, valid_PJG, logged)

    def direct(
        self, logits_PJGK: Tensor, mu_PJG: Tensor, label_PJ: Tensor, valid_PJG: Tensor, logged: dict[str, float]
    ) -> Tensor:
        """Supervision besides the reward: none in GRPO."""
        del mu_PJG, label_PJ, valid_PJG, logged
        return logits_PJGK.new_zeros(())
