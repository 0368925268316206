"""Notices a run that hedges: its training figures improve while its agreement on other prompts falls.

A policy that drifts to the middle of the scale gains in loss and in mean reward, because the middle is never far off;
but it no longer says which picture is better. No training figure shows that, so held-out agreement is watched. A policy
that learns its training set by heart looks the same from here, and has to be stopped as well.

The rule, at every evaluation: the best held-out PLCC is at least `patience` evaluations back; the last one is the
lowest since then, by more than `SLACK` below the best; and over the same time the reward rose or, where there is none,
the divergence from the teacher or the loss fell.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zscore.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping

WATCHED = "plcc_overall"
SIGNS = {"reward": 1, "reverse_kl": -1, "loss": -1}
"""Training figures, with the sign of getting better; the first that a run logs is watched.

The loss of an algorithm that learns from rewards says nothing: its gradient is right, its value is not.
"""
SLACK = 0.02
"""Of PLCC: smaller falls are taken for noise."""


class HedgingError(EngineError):
    """Training figures improve while held-out agreement falls."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was seen at one evaluation."""

    step: int
    agreement: float
    """Held-out PLCC."""
    figures: Mapping[str, float]
    """Means of the training figures over the steps since the evaluation before."""


@dataclass(slots=True)
class Guard:
    """Watches one run, step by step; a run that goes on shows it the steps of its log again."""

    patience: int
    """Evaluations; 0 never complains."""
    history: list[Evaluation] = field(default_factory=list)
    _since: list[Mapping[str, float]] = field(default_factory=list)

    def see(self, step: int, found: Mapping[str, float]) -> str | None:
        """Take in what a step logged; returns what is wrong, in a line, or None."""
        self._since.append({name: found[name] for name in SIGNS if name in found})
        if WATCHED not in found:
            return None
        self.history.append(Evaluation(step, found[WATCHED], _means(self._since)))
        self._since = []
        return complaint(self.history, self.patience)


def complaint(history: list[Evaluation], patience: int) -> str | None:
    """What is wrong after the last evaluation, by the rule above.

    Args:
        history: evaluations in the order of the steps.
        patience: evaluations; 0 turns the rule off.
    """
    if not patience or len(history) <= patience:
        return None
    top = max(one.agreement for one in history)
    at = max(number for number, one in enumerate(history) if one.agreement == top)
    best, since, last = history[at], history[at + 1 :], history[-1]
    if len(since) < patience or last.agreement > min(one.agreement for one in since) or top - last.agreement <= SLACK:
        return None
    name = next((name for name in SIGNS if name in best.figures and name in last.figures), None)
    if name is None or not SIGNS[name] * (last.figures[name] - best.figures[name]) > 0:  # nor where they are no numbers
        return None
    before, after = best.figures[name], last.figures[name]
    return (
        f"step {last.step}: {name} went from {before:.4g} to {after:.4g} while the held-out PLCC fell from {top:.3f}"
        f" (step {best.step}) to {last.agreement:.3f}: the policy hedges to the mean or learns its training set by"
        f" heart; start again with a lower learning_rate or steps={best.step}, or give it other data (patience=0 turns"
        " this check off)"
    )


def _means(steps: list[Mapping[str, float]]) -> dict[str, float]:
    names = {name for found in steps for name in found}
    kept = {name: [found[name] for found in steps if name in found] for name in names}
    return {name: sum(values) / len(values) for name, values in kept.items()}
