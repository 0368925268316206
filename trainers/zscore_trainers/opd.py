"""OPD, on-policy distillation (eqs. 18 and 19): the baseline that distils the teacher's words instead of its scores.

The student writes, the teacher says how likely it finds each token, and the difference is the token's advantage. Two
variants: with `live` the advantage is measured against the student as it is in this step, else (the paper's) against
the student that wrote. A batch serves one step, so they are as far apart as the generator's arithmetic is from the
trainer's: nothing in float32, something where vLLM writes in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from zscore.checkpoint import read_normalization
from zscore.errors import ModelError
from zscore.text_tokenizer import TextTokenizer
from zscore_trainers import losses
from zscore_trainers.checks import check_least, check_one_of
from zscore_trainers.rollouts import by_length, rollout_seed
from zscore_trainers.sequences import at_left, collate, read_outputs, token_logprobs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from zscore.checkpoint import Checkpoint
    from zscore.rubrics.rubric import Rubric
    from zscore_trainers.data import Order
    from zscore_trainers.policy import ScorePolicy
    from zscore_trainers.rollouts import Rollout, Sampling


PROBE = "Naïve: 4.5 of 5, isn't it?\n\n\t„3×3“ = 9; 日本語 🙂 a_b-c  12345 "
"""A text that tokenizers of one vocabulary but other rules cut up differently."""


def check_teacher(teacher: Checkpoint, student: Checkpoint, rubric: Rubric) -> None:
    """Refuse a teacher to whom the student's tokens or patches are something else.

    It may know more tokens than the student, for these are never written.

    Raises:
        ModelError: names the first difference.
    """
    theirs, mine = TextTokenizer(teacher.path), TextTokenizer(student.path)
    known = theirs.vocabulary
    other = next((word for word, number in mine.vocabulary.items() if known.get(word) != number), None)
    fix = "give --teacher a checkpoint of the student's family"
    if other is not None:
        ids = f"{mine.vocabulary[other]} to the student, {known.get(other, 'nothing')} to {teacher.id}"
        raise ModelError(f"opd: token {other!r} is {ids}: {fix}")
    for text in (*(level.token for level in rubric.levels), PROBE):
        if mine.encode(text) != theirs.encode(text):
            ids = f"{mine.encode(text)[:8]} to the student, {theirs.encode(text)[:8]} to {teacher.id}"
            raise ModelError(f"opd: the text {text[:16]!r} becomes {ids}: {fix}")
    cut, wanted = ((one.patch, one.merge, read_normalization(one.path)) for one in (teacher, student))
    if cut != wanted:
        raise ModelError(f"opd: {teacher.id} reads pictures with patch, merge, scaling {cut}, not {wanted}: {fix}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpdConfig:
    """How much at a time."""

    batch_size: int = 64
    """Outputs a step, over all ranks."""
    micro_batch: int = 8
    """Sequences a forward pass."""
    against: Literal["old", "live"] = "old"
    """Whose log-probabilities the teacher's are compared with: the policy's that wrote, or the live one's."""
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        """Refuse what can't be meant.

        Raises:
            UsageError: names the setting.
        """
        check_one_of("against", self.against, ("old", "live"))
        check_least(self, 1, "batch_size", "micro_batch", "max_tokens")


class Opd:
    """Gradients of eq. 19; see `zscore_trainers.engine.Algorithm`.

    Args:
        config: how.
        order: over the questions: sample x dimension.
        dimensions: of the rubric.
        sampling: where outputs come from.
        teacher: one that `check_teacher` takes; frozen.
    """

    def __init__(
        self,
        config: OpdConfig,
        order: Order,
        dimensions: int,
        sampling: Sampling,
        teacher: ScorePolicy,
    ) -> None:
        order.check_ranks(sampling.ranks)
        self._config = config
        self._order = order
        self._dimensions = dimensions
        self.sampling = sampling
        self._teacher = teacher.requires_grad_(requires_grad=False).eval()

    def backward(self, policy: ScorePolicy, step: int) -> Mapping[str, float]:
        """Roll out and add the gradients of one batch."""
        numbers = self.sampling.share(self._order, step)
        self.sampling.rollouts.follow(policy)
        drawn = self._draw(numbers, step)
        drawn = [drawn[at] for at in by_length(drawn)]
        totals = torch.zeros(4, dtype=torch.float64)
        for start in range(0, len(drawn), self._config.micro_batch):
            some = drawn[start : start + self._config.micro_batch]
            loss, advantage = self._loss(policy, some)
            (loss * (len(some) / len(drawn))).backward()  # type: ignore[no-untyped-call]
            valid = sum(one.written.score_at is not None for one in some)
            mass = sum(one.mass for one in some)
            totals += torch.tensor([float(loss.detach()) * len(some), advantage * len(some), valid, mass])
        loss_mean, advantage_mean, valid_share, mass_mean = (totals / len(drawn)).tolist()
        # Of the mass too a mean over all outputs, so that ranks' means have the mean of all: none without a score.
        return {"loss": loss_mean, "reverse_kl": -advantage_mean, "valid": valid_share, "mass": mass_mean}

    def _draw(self, numbers: Sequence[int], step: int) -> list[Rollout]:
        found = self.sampling.collator.prompts([number // self._dimensions for number in numbers])
        prompts = [some[number % self._dimensions] for some, number in zip(found, numbers, strict=True)]
        again = self.sampling.repeats(self._order, step)
        seeds = [rollout_seed(self.sampling.seed, step, *pair) for pair in zip(numbers, again, strict=True)]
        return self.sampling.rollouts.draw(prompts, seeds)

    def _loss(self, policy: ScorePolicy, some: Sequence[Rollout]) -> tuple[Tensor, float]:
        batch = collate(self.sampling.collator.pad, [(one.prompt, one.written) for one in some])
        width = max(len(one.written.tokens) for one in some)
        logprob_BT = read_outputs(policy, batch, width)[1]
        output_BT = at_left(batch.output_BT, batch, width).to(logprob_BT.device)
        theirs_BT = token_logprobs(self._teacher, batch, width)
        mine_BT = logprob_BT.detach()
        if self._config.against == "old":
            mine_BT = torch.zeros_like(logprob_BT)
            for row, one in enumerate(some):
                mine_BT[row, : len(one.logprob_T)] = torch.from_numpy(one.logprob_T)
        advantage_BT = losses.opd_advantages(theirs_BT, mine_BT)
        # As the loss: over an output's tokens, then over outputs, so that no micro-batch and no rank weighs more.
        mean_B = (advantage_BT * output_BT).sum(-1) / output_BT.sum(-1).clamp(min=1)
        return losses.opd_loss(logprob_BT, advantage_BT, output_BT), float(mean_B.mean())
