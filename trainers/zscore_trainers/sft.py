"""SFT: the score tokens supervised by people's labels at the direct position (eq. 8), nothing written; a baseline.

A label becomes a distribution with the label as its mean (`zscore_trainers.losses.label_targets`). Against a fixed
target the cross-entropy of eq. 8 and the divergence of eq. 15 differ by the target's entropy alone, which has no
gradient: so this is algorithm 2 with people in the teacher's place.
"""

from __future__ import annotations

from zscore_trainers.risd import Risd


class Sft(Risd):
    """Gradients of eq. 8, with RISD's settings; `divergence` in the log is short of the targets' entropy."""
