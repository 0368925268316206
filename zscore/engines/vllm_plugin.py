"""Entry point of vLLM's plugin group: tells vLLM our architecture's name, and nothing more.

vLLM calls it in each of its processes, also in those of users who only have zscore installed: the model's code is
named by a string and imported when a checkpoint asks for it.
"""

from __future__ import annotations

ARCHITECTURE = "ZscoreQwen3_5ForLevelProbes"
MODEL = "zscore.engines.vllm_model:LevelProbeModel"


def register() -> None:
    """Register the pooling model with vLLM's model registry; may be called more than once."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
