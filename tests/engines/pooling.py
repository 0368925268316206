"""Feeds vLLM's pooler by hand: requests in chunks, laid out as a step of the engine lays them out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

H, K = 8, 5


def imported_model() -> Any:
    """The module of the pooling model, which imports vLLM."""
    from zscore.engines.vllm_start import prepare_import, quiet

    prepare_import()
    with quiet():  # vLLM's imports warn of their own deprecations
        from zscore.engines import vllm_model
    return vllm_model


class Request:
    """One request's hidden states, fed to the pooler in chunks."""

    def __init__(self, seed: int, length: int, probes: tuple[int, ...], device: str = "cpu") -> None:
        from vllm.v1.pool.metadata import PoolingStates

        self.hidden = torch.randn(length, H, generator=torch.Generator().manual_seed(seed)).to(device)
        self.probes, self.state, self.done = probes, PoolingStates(), 0


def step(pooler, requests, counts):
    """Feed the next `counts` tokens of each request, as vLLM lays them out: one after the other."""
    from vllm import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata

    hidden = torch.cat([r.hidden[r.done : r.done + n] for r, n in zip(requests, counts, strict=True)])
    for request, count in zip(requests, counts, strict=True):
        request.done += count
    metadata = PoolingMetadata(
        prompt_lens=torch.tensor([len(r.hidden) for r in requests]),
        prompt_token_ids=None,
        prompt_token_ids_cpu=None,
        pooling_params=[PoolingParams(task="classify", extra_kwargs={"probes": list(r.probes)}) for r in requests],
        pooling_states=[r.state for r in requests],
    )
    ends = torch.tensor([r.done for r in requests])
    metadata.build_pooling_cursor(np.array(counts), ends, device=hidden.device)
    return pooler(hidden, metadata)
