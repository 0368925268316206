"""The reference generator: Hugging Face transformers, on whatever device torch has.

Prompts of one length make a batch: they need no padding, and left padding isn't exact for the gated delta net. Tokens
are drawn by adding Gumbel noise to the logits, from each output's own generator; so an output doesn't depend on what
else is in its batch, beyond rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zscore._torchvision import ensure_importable
from zscore.engines.generate import Output, check_weights, pads, weight_shapes, whole
from zscore.engines.transformers import Scaling, load_model, pick_device, pick_dtype
from zscore.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from zscore.engines.generate import GenerateConfig, Stop
    from zscore.records import EnginePrompt, Failure

    Job = tuple[int, EnginePrompt, int]

# Legend: B outputs of a batch, T tokens, K levels, V vocabulary.


class TransformersGenerator:
    """Writes with a transformers model (see `zscore.engines.generate.Generator`).

    Args:
        model: checkpoint folder.
        level_token_ids: the K level tokens.
        stop: when an output is at its end.
        config: how to draw.

    Raises:
        ModelError: transformers can't load it.
    """

    name = "transformers"

    def __init__(self, model: Path, *, level_token_ids: Sequence[int], stop: Stop, config: GenerateConfig) -> None:
        ensure_importable()
        import transformers

        self.version = transformers.__version__
        device = pick_device("auto")
        self.dtype = pick_dtype(config.dtype, device)
        self._model = load_model(model, getattr(torch, self.dtype), device)
        # Else what the checkpoint's generation_config.json wants is applied before our draws: a penalty, a top-k.
        self._model.generation_config = transformers.GenerationConfig()
        self._scaling = Scaling(model, self._model.config, device, self._model.dtype)
        self._shapes = weight_shapes(model)
        self._levels_K = torch.tensor(list(level_token_ids), device=device)
        self._stop = stop
        self._config = config
        self._image_token = int(self._model.config.image_token_id)
        self.max_in_flight = 2 * config.batch_size
        self.max_tokens = int(self._model.config.get_text_config().max_position_embeddings) - config.max_tokens
        self._queue: list[Job] = []

    def submit(self, tag: int, prompt: EnginePrompt, seed: int) -> None:
        """Queue one prompt."""
        self._queue.append((tag, prompt, seed))

    def step(self) -> list[tuple[int, Output | Failure]]:
        """Write the outputs of the next prompts that are as long as the first."""
        length = len(self._queue[0][1].token_ids)
        batch = [job for job in self._queue if len(job[1].token_ids) == length][: self._config.batch_size]
        taken = {job[0] for job in batch}
        self._queue = [job for job in self._queue if job[0] not in taken]
        try:
            outputs = self._write(batch)
        except torch.OutOfMemoryError as error:
            raise EngineError(f"out of GPU memory on a batch of {len(batch)}: lower --batch-size") from error
        return [(tag, output) for (tag, _, _), output in zip(batch, outputs, strict=True)]

    @torch.inference_mode()
    def _write(self, batch: list[Job]) -> list[Output]:
        import transformers

        prompts = [prompt for _, prompt, _ in batch]
        device = self._levels_K.device
        tokens_BT = torch.tensor([prompt.token_ids for prompt in prompts], device=device)
        draws = _Draws(
            [seed for _, _, seed in batch], self._levels_K, self._config.temperature, pads(self._model.config)
        )
        width = tokens_BT.shape[1]
        found_BT = self._model.generate(
            input_ids=tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            mm_token_type_ids=(tokens_BT == self._image_token).int(),
            pixel_values=torch.cat([self._scaling(prompt) for prompt in prompts]),
            image_grid_thw=torch.tensor([(1, *prompt.pixels.grid) for prompt in prompts], device=device),
            logits_processor=transformers.LogitsProcessorList([draws]),
            stopping_criteria=transformers.StoppingCriteriaList([_Ends(self._stop, width)]),
            generation_config=self._generation(),
        )
        return [draws.output(row, self._ended(found_BT[row, width:].tolist())) for row in range(len(batch))]

    def _ended(self, tokens: list[int]) -> tuple[int, ...]:
        """Without the padding behind the end."""
        for count in range(1, len(tokens) + 1):
            if self._stop(tokens[:count]):
                return tuple(tokens[:count])
        return tuple(tokens)

    def _generation(self) -> Any:
        import transformers

        return transformers.GenerationConfig(
            do_sample=False,  # the draws are ours
            max_new_tokens=self._config.max_tokens,
            pad_token_id=min(self._stop.end_tokens),
            eos_token_id=sorted(self._stop.end_tokens),
        )

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Take over weights by their names in the checkpoint."""
        given = check_weights(dict(weights), self._shapes)
        mine = self._model.state_dict()
        for name, weight in given.items():
            mine[name].copy_(whole(weight.to(mine[name].dtype)))  # narrowed first: there is less to send

    def close(self) -> None:
        """Free the model."""
        self._queue.clear()
        self._model = None


class _Draws:
    """Turns logits into those whose largest is the drawn token, and keeps what the model said.

    argmax(logits / temperature + Gumbel noise) is a draw from the softmax.
    """

    def __init__(self, seeds: Sequence[int], levels_K: torch.Tensor, temperature: float, never: Sequence[int]) -> None:
        self._noise = [np.random.default_rng(seed) for seed in seeds]
        self._levels_K = levels_K
        self._temperature = temperature
        self._never = list(never)
        self._levels: list[torch.Tensor] = []
        self._chosen: list[torch.Tensor] = []

    def __call__(self, tokens_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """For one position."""
        del tokens_BT
        logprob_BV = logits_BV.float().log_softmax(-1)
        drawn_BV = logprob_BV.clone()
        if self._temperature > 0:
            uniform_BV = np.stack([noise.random(logits_BV.shape[1], np.float32) for noise in self._noise])
            noise_BV = -torch.log(-torch.log(torch.from_numpy(uniform_BV).clamp(1e-20, 1 - 1e-7)))
            drawn_BV = logprob_BV / self._temperature + noise_BV.to(logprob_BV.device)
        drawn_BV[:, self._never] = -torch.inf
        self._levels.append(logprob_BV[:, self._levels_K])
        self._chosen.append(logprob_BV.gather(1, drawn_BV.argmax(-1, keepdim=True)).squeeze(1))
        return drawn_BV

    def output(self, row: int, tokens: tuple[int, ...]) -> Output:
        """What was kept of one output."""
        logprob_T = torch.stack([one[row] for one in self._chosen[: len(tokens)]])
        level_TK = torch.stack([one[row] for one in self._levels[: len(tokens)]])
        return Output(tokens, logprob_T.cpu().numpy(), level_TK.cpu().numpy())


class _Ends:
    """Which outputs are at their end."""

    def __init__(self, stop: Stop, width: int) -> None:
        self._stop = stop
        self._width = width

    def __call__(self, tokens_BT: torch.Tensor, scores: Any) -> torch.Tensor:
        """(B,) booleans."""
        del scores
        found = [self._stop(row) for row in tokens_BT[:, self._width :].tolist()]
        return torch.tensor(found, device=tokens_BT.device)
