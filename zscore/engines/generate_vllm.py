"""The fast generator: real vLLM with the checkpoint's own architecture, pictures as patches that are cut already.

vLLM samples with a generator of each request's own, and returns the level tokens' log-probabilities at every position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zscore.engines.generate import Output, check_weights, pads, weight_shapes, whole
from zscore.engines.transformers import Scaling
from zscore.engines.vllm import SUPPORTED, Pictures, image_inputs
from zscore.engines.vllm_start import VllmConfig, one_line, read_config, register_by_class, start
from zscore.engines.vllm_start import stop as shut_down
from zscore.errors import EngineError, ModelError
from zscore.records import Failure, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from zscore.engines.generate import GenerateConfig, Stop
    from zscore.records import EnginePrompt

# Legend: T tokens of an output, K levels.
# A bias that no logit outweighs.
NEVER = -100.0


class VllmGenerator:
    """Writes with a Qwen3.5 checkpoint in vLLM (see `zscore.engines.generate.Generator`).

    Args:
        model: checkpoint folder.
        level_token_ids: the K level tokens.
        level_texts: their texts.
        stop: when an output is at its end.
        config: how to draw.

    Raises:
        ModelError: vLLM can't load it, or it is of another architecture.
    """

    name = "vllm"

    def __init__(
        self,
        model: Path,
        *,
        level_token_ids: Sequence[int],
        level_texts: Sequence[str],
        stop: Stop,
        config: GenerateConfig,
    ) -> None:
        found = read_config(str(model)).get("architectures") or ["none"]
        if found != [SUPPORTED]:
            raise ModelError(f"{model} is a {found[0]}; vLLM reasons with {SUPPORTED} only: --engine transformers")
        register_by_class(SUPPORTED)
        settings = VllmConfig(
            dtype=config.dtype,
            max_num_seqs=config.batch_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            chunked_prefill=True,
        )
        self._engine: Any = start(str(model), settings, runner="generate", mm_device_do_normalize=False)
        import vllm

        model_config = self._engine.model_config
        self.version: str = vllm.__version__
        self.dtype = str(model_config.dtype).removeprefix("torch.")
        self.max_tokens = int(model_config.max_model_len) - config.max_tokens
        self.max_in_flight = 2 * config.batch_size
        self._shapes = weight_shapes(model)
        self._levels = list(level_token_ids)
        self._stop = stop
        self._config = config
        self._never = dict.fromkeys(pads(model_config.hf_config), NEVER)
        self._image_token = int(model_config.hf_config.image_token_id)
        self._stops = [stop.finder.marker + text for text in level_texts]
        self._scaling = Scaling(model, model_config.hf_config, torch.device("cpu"), model_config.dtype)
        self._refused: list[tuple[int, Failure]] = []
        self._pictures = Pictures()

    def submit(self, tag: int, prompt: EnginePrompt, seed: int) -> None:
        """Queue one prompt; one that is too long comes back as a failure."""
        length = len(prompt.token_ids)
        if length > self.max_tokens:
            text = f"{length} tokens; the limit is {self.max_tokens}: shorten the prompt or lower --max-pixels"
            self._refused.append((tag, Failure(Status.PROMPT_TOO_LONG, text)))
            return
        name = self._pictures.enter(tag, prompt.pixels)
        rendered = image_inputs(prompt, self._scaling(prompt), self._image_token, name)
        try:
            self._engine.add_request(str(tag), rendered, self._params(seed))
        except Exception as error:  # vLLM checks what it is given by raising anything
            self._pictures.leave(tag)
            raise EngineError(f"vLLM refused a prompt: {one_line(error)}") from error

    def _params(self, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=self._config.temperature,
            max_tokens=self._config.max_tokens,
            seed=seed,
            logprobs=len(self._levels),
            logprob_token_ids=self._levels,
            logit_bias=self._never,
            stop=self._stops,
            stop_token_ids=sorted(self._stop.end_tokens),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
        )

    def step(self) -> list[tuple[int, Output | Failure]]:
        """Write one token of each output; return those that are at their end."""
        results: list[tuple[int, Output | Failure]] = list(self._refused)
        self._refused.clear()
        if not self._pictures:
            return results
        try:
            outputs = self._engine.step()
        except Exception as error:  # out of memory, a dead worker, a kernel's assertion
            raise EngineError(f"vLLM stopped: {one_line(error)}") from error
        for output in outputs:
            if output.finished:
                tag = int(output.request_id)
                self._pictures.leave(tag)
                results.append((tag, self._output(output.outputs[0])))
        return results

    def _output(self, written: Any) -> Output:
        tokens = tuple(written.token_ids)
        found = [{int(token): float(one.logprob) for token, one in at.items()} for at in written.logprobs]
        return Output(
            tokens,
            np.array([at[token] for at, token in zip(found, tokens, strict=True)], np.float32),
            np.array([[at[level] for level in self._levels] for at in found], np.float32),
        )

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Take over weights by their names in the checkpoint."""
        given = check_weights(dict(weights), self._shapes)
        one_by_one = ((name, whole(weight)) for name, weight in given.items())
        try:
            # What vLLM repacks for its kernels when it loads, it repacks again.
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": one_by_one})
            self._engine.reset_prefix_cache()
            self._engine.reset_encoder_cache()
        except Exception as error:
            raise ModelError(f"vLLM can't take over the weights: {one_line(error)}") from error

    def close(self) -> None:
        """Free the model."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            shut_down(engine)
