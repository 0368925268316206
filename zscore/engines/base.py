"""The engine protocol: prompts in, level distributions out, continuously.

The caller keeps at most `max_in_flight` prompts inside; an engine never drops one: every submitted tag comes back
exactly once from `step`, with scores or with a `Failure`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from zscore.records import EnginePrompt, Failure, LevelScores


class Engine(Protocol):
    """Scores prompts; see `zscore.engines.transformers` (reference) and `zscore.engines.vllm` (fast)."""

    name: str
    """`transformers` or `vllm`."""
    version: str
    """Of the library behind it."""
    dtype: str
    """Of the body's weights: `float32` or `bfloat16`. The score head is always float32."""
    max_in_flight: int
    """How many prompts keep it busy; more only costs memory."""
    max_tokens: int
    """Longest prompt it takes, in tokens."""
    lockstep: bool
    """True where a batch's composition can change the last bits of a score and the engine forms batches itself.

    The caller then steps only when `max_in_flight` prompts are inside or a shard has ended, and feeds in order, so
    that a shard's batches, and its scores, are the same in every run.
    """

    def submit(self, tag: int, prompt: EnginePrompt) -> None:
        """Queue one prompt under a caller's tag (unique among those in flight)."""

    def step(self) -> list[tuple[int, LevelScores | Failure]]:
        """Advance; return what finished, in any order (may be empty). Call only while something is in flight."""

    def close(self) -> None:
        """Free the model. Idempotent."""
