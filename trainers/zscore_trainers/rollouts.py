"""Rollouts: what the policy writes for given prompts, and where its scores stand.

    prompts, seeds → generator (transformers or vLLM; zscore.engines.generate) → Rollout

The generator has weights of its own; `follow` hands over the policy's. Under torchrun every rank has a generator with
all weights and draws for its own share; seeds know nothing of ranks, so neither do the outputs, up to the rounding of
other batches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zscore.errors import SampleError
from zscore.records import Failure
from zscore_trainers.lora import whole_weights
from zscore_trainers.sequences import Written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from zscore.engines.generate import Generator, Output
    from zscore.reasoning import ScoreFinder
    from zscore.records import EnginePrompt
    from zscore_trainers.data import Collator, Order
    from zscore_trainers.policy import ScorePolicy

# Legend: T tokens of an output, K levels.


AT_A_TIME = 64
"""Outputs that transformers writes together."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled output."""

    prompt: EnginePrompt
    written: Written
    logprob_T: NDArray[np.float32]
    """Of each token, as the generator sampled it."""
    probs_K: NDArray[np.float32] | None
    """The generator's own distribution at the score, to see how far it is from the policy's; None without one."""
    mass: float = 0.0
    """Of the level tokens at the score, as the generator has it."""

    def __len__(self) -> int:
        """Tokens of the prompt and the output."""
        return len(self.prompt.token_ids) + len(self.written.tokens)


def by_length(drawn: Sequence[Rollout]) -> list[int]:
    """Their numbers, short ones first: micro-batches of like lengths leave little padding to compute."""
    return sorted(range(len(drawn)), key=lambda at: len(drawn[at]))


class Rollouts:
    """Draws rollouts."""

    def __init__(self, generator: Generator, finder: ScoreFinder) -> None:
        self._generator = generator
        self._finder = finder

    def follow(self, policy: ScorePolicy) -> None:
        """Write as the policy does, from now on; to be called on all ranks that share the policy."""
        self._generator.load_weights(whole_weights(policy.model).items())

    def draw(self, prompts: Sequence[EnginePrompt], seeds: Sequence[int]) -> list[Rollout]:
        """One output for each prompt; the same seeds give the same outputs.

        Raises:
            SampleError: a prompt can't be continued; says why.
        """
        waiting = list(enumerate(zip(prompts, seeds, strict=True)))[::-1]
        inside, found = 0, dict[int, Rollout]()
        while waiting or inside:
            while waiting and inside < self._generator.max_in_flight:
                tag, (prompt, seed) = waiting.pop()
                self._generator.submit(tag, prompt, seed)
                inside += 1
            for tag, output in self._generator.step():
                inside -= 1
                if isinstance(output, Failure):
                    raise SampleError(f"no rollout: {output.error}")
                found[tag] = self._rollout(prompts[tag], output)
        return [found[tag] for tag in range(len(prompts))]

    def _rollout(self, prompt: EnginePrompt, output: Output) -> Rollout:
        at = self._finder.find(output.tokens)
        written = Written(output.tokens, at)
        if at is None:
            return Rollout(prompt, written, output.logprob_T, None)
        weights_K = np.exp(output.level_logprob_TK[at] - output.level_logprob_TK[at].max())
        mass = float(np.exp(output.level_logprob_TK[at]).sum())
        return Rollout(prompt, written, output.logprob_T, weights_K / weights_K.sum(), mass)

    def close(self) -> None:
        """Free the generator."""
        self._generator.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Where an algorithm that learns from its own outputs gets them."""

    collator: Collator
    """In the reasoning layout."""
    rollouts: Rollouts
    values: Sequence[float]
    """What the levels are worth."""
    seed: int = 0
    """Of the rollouts."""
    rank: int = 0
    ranks: int = 1

    def share(self, order: Order, step: int) -> list[int]:
        """This rank's part of a step's batch."""
        return order.share(step, self.rank, self.ranks)

    def repeats(self, order: Order, step: int) -> list[int]:
        """How often each of that came before in the batch: such outputs are drawn with other seeds."""
        return order.repeats(step, self.rank, self.ranks)


def rollout_seed(*numbers: int) -> int:
    """A seed of 63 bits from run, step, pair, side and number: the same in a resume and on any rank."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
