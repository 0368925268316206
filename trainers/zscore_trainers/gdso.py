"""GDSO, Group-wise Direct Score Optimization (algorithm 1): GRPO with direct gradients at the scores (eq. 14).

Every sampled distribution is pulled towards its picture's label (eq. 8), and every score gap between the two sides'
outputs, G x G of them, towards the labels' gap (eq. 11).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zscore_trainers import losses
from zscore_trainers.checks import check_least
from zscore_trainers.grpo import Grpo, GrpoConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GdsoConfig(GrpoConfig):
    """Weights of the direct losses."""

    alpha_pt: float = 1.0
    """Of eq. 8."""
    alpha_pw: float = 1.0
    """Of eq. 11."""

    def __post_init__(self) -> None:
        """Refuse settings that can't be meant, those of GRPO among them.

        Raises:
            UsageError: names the setting.
        """
        GrpoConfig.__post_init__(self)  # super() isn't there in a class with slots
        check_least(self, 0, "alpha_pt", "alpha_pw")


class Gdso(Grpo):
    """Gradients of algorithm 1; see `zscore_trainers.engine.Algorithm` and `Grpo` for the arguments."""

    _config: GdsoConfig

    def direct(
        self, logits_PJGK: Tensor, mu_PJG: Tensor, label_PJ: Tensor, valid_PJG: Tensor, logged: dict[str, float]
    ) -> Tensor:
        """Eqs. 8 and 11; outputs without a score are in neither."""
        target_PJK = losses.label_targets(label_PJ, self._values_K.to(label_PJ))
        pointwise = losses.pointwise_loss(logits_PJGK, target_PJK, valid_PJG)
        pairwise = losses.pairwise_loss(mu_PJG, label_PJ, self._range, valid_PJG)
        logged["pointwise"], logged["pairwise"] = float(pointwise.detach()), float(pairwise.detach())
        return self._config.alpha_pt * pointwise + self._config.alpha_pw * pairwise
