"""The fast engine: real vLLM around the body, our pooler reading every probe of a prompt in one prefill.

vLLM's own image path (one HF-processor thread, about 50 pictures/s) and its hashing of every picture are bypassed:
prompts go in as token ids with uint8 patches, already cut by the decoding workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from zscore.distribution import EXTRA, unpack
from zscore.engines.vllm_plugin import ARCHITECTURE
from zscore.engines.vllm_start import VllmConfig, importing, one_line, prepare_import, quiet, read_config, start, stop
from zscore.errors import EngineError, ModelError, ZscoreError
from zscore.records import Failure, Status

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from zscore.records import EnginePrompt, LevelScores, Pixels

__all__ = ["SUPPORTED", "VllmConfig", "VllmEngine"]

SUPPORTED = "Qwen3_5ForConditionalGeneration"


class VllmEngine:
    """Scores prompts with a Qwen3.5 checkpoint in vLLM; see `zscore.engines.base.Engine`.

    Args:
        model: Checkpoint folder.
        level_token_ids: The K level tokens, in rubric order.
        level_values: What each level is worth.
        config: How to run vLLM.

    Raises:
        ModelError: The checkpoint can't be loaded, is of another architecture, or has no such tokens.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | Path,
        *,
        level_token_ids: tuple[int, ...],
        level_values: tuple[float, ...],
        config: VllmConfig | None = None,
    ) -> None:
        config = config or VllmConfig()
        _check_levels(read_config(str(model)), level_token_ids, level_values)
        self._levels = (level_token_ids, level_values)
        self._engine: Any = self._start(str(model), config)
        import vllm

        on_cpu = vllm.platforms.current_platform.is_cpu()
        model_config = self._engine.model_config
        self.version: str = vllm.__version__
        self.dtype = str(model_config.dtype).removeprefix("torch.")
        self.max_tokens: int = model_config.max_model_len
        self.max_in_flight = 2 * config.max_num_seqs
        # On a CPU a prompt's scores are the same to the last bit whatever it is batched with (tested).
        self.lockstep = config.chunked_prefill or config.prefix_caching or not on_cpu
        self._image_token = _image_token(model_config.hf_config)
        self._refused: list[tuple[int, Failure]] = []
        self._pictures = Pictures()

    def _start(self, model: str, config: VllmConfig) -> Any:
        """Start vLLM with our model in place of the checkpoint's architecture."""
        found = read_config(model).get("architectures") or ["none"]
        if found != [SUPPORTED]:
            raise ModelError(f"{model} is a {found[0]}; the probe model reads {SUPPORTED}")
        prepare_import()
        with quiet(), importing():
            from vllm import ModelRegistry

            from zscore.engines.vllm_model import LevelProbeModel

            # By class: by name (as the plugin does for other processes) vLLM would first look at it in a subprocess.
            ModelRegistry.register_model(ARCHITECTURE, LevelProbeModel)
        token_ids, values = self._levels
        overrides = {
            "architectures": [ARCHITECTURE],
            "zscore_level_token_ids": list(token_ids),
            "zscore_level_values": list(values),
        }
        # Patches are scaled by our model; vLLM 0.32 would scale them again.
        engine = start(model, config, hf_overrides=overrides, mm_device_do_normalize=False)
        if engine.vllm_config.device_config.device_type == "cpu" and "bfloat16" not in str(engine.model_config.dtype):
            stop(engine)
            raise ModelError(
                f"vLLM's CPU kernels for {SUPPORTED} are bfloat16 only: give --dtype bfloat16, or --engine transformers"
            )
        return engine

    def submit(self, tag: int, prompt: EnginePrompt) -> None:
        """Queue one prompt; one that is too long comes back as a failure."""
        length = len(prompt.token_ids)
        if length > self.max_tokens:
            text = f"{length} tokens; the limit is {self.max_tokens}: shorten the prompt or lower --max-pixels"
            self._refused.append((tag, Failure(Status.PROMPT_TOO_LONG, text)))
            return
        name = self._pictures.enter(tag, prompt.pixels)
        try:
            refusal = self._add(str(tag), prompt, name)
        except ZscoreError:
            self._pictures.leave(tag)
            raise
        except Exception as error:  # vLLM checks what it is given by raising anything
            self._pictures.leave(tag)
            raise EngineError(f"vLLM refused a prompt: {one_line(error)}") from error
        if refusal is not None:
            self._pictures.leave(tag)
            self._refused.append((tag, refusal))

    def _add(self, request: str, prompt: EnginePrompt, picture: str) -> Failure | None:
        import torch
        from vllm import PoolingParams

        tokens = prompt.token_ids
        patches_NX = np.require(prompt.pixels.patches_NCPP, requirements=["C", "W"]).reshape(
            len(prompt.pixels.patches_NCPP), -1
        )
        rendered = image_inputs(prompt, torch.from_numpy(patches_NX), self._image_token, picture)
        last_only = prompt.probes == (len(tokens) - 1,)
        params = PoolingParams(
            task="classify",
            # The last token is always computed; a cache hit on anything longer would skip the probes before it.
            skip_reading_prefix_cache=not last_only,
            extra_kwargs={"probes": list(prompt.probes)},
        )
        self._engine.add_request(request, rendered, params)
        return None

    def step(self) -> list[tuple[int, LevelScores | Failure]]:
        """Run one batch; return what it finished and what `submit` refused."""
        results: list[tuple[int, LevelScores | Failure]] = list(self._refused)
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
                results.append((tag, self._scores(output.outputs.data)))
        return results

    def _scores(self, data: Any) -> LevelScores | Failure:
        return unpack(data.reshape(-1, len(self._levels[0]) + EXTRA).numpy())

    def close(self) -> None:
        """Free the model. Idempotent."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            stop(engine)


def image_inputs(prompt: EnginePrompt, pixels_NX: torch.Tensor, image_token: int, name: str) -> dict[str, Any]:
    """What vLLM makes of a prompt and its picture by itself, made by us.

    Args:
        prompt: token ids, with the picture's placeholders expanded.
        pixels_NX: its patches, as the model reads them.
        image_token: the placeholder.
        name: of the picture; those of one name share their run through the vision tower.
    """
    import torch
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    items = MultiModalKwargsItems.from_hf_inputs(
        {"pixel_values": pixels_NX, "image_grid_thw": torch.tensor([[1, *prompt.pixels.grid]])},
        {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", torch.tensor([len(pixels_NX)])),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        },
    )
    tokens = list(prompt.token_ids)
    place = PlaceholderRange(offset=tokens.index(image_token), length=tokens.count(image_token))
    return {
        "type": "multimodal",
        "prompt_token_ids": tokens,
        "mm_kwargs": items,
        "mm_hashes": {"image": [name]},
        "mm_placeholders": {"image": [place]},
    }


class Pictures:
    """Names the pictures that are in flight; prompts that share one share its run through the vision tower."""

    def __init__(self) -> None:
        self._held: dict[int, Pixels] = {}  # keeps the objects alive, so that no two have one id
        self._names: dict[int, str] = {}
        self._count = 0

    def __len__(self) -> int:
        """Requests that are in flight."""
        return len(self._held)

    def enter(self, tag: int, pixels: Pixels) -> str:
        """Note that a request reads this picture; returns its name."""
        self._held[tag] = pixels
        if id(pixels) not in self._names:
            self._names[id(pixels)] = f"picture-{self._count}"
            self._count += 1
        return self._names[id(pixels)]

    def leave(self, tag: int) -> None:
        """Note that a request is done with its picture."""
        pixels = self._held.pop(tag)
        if not any(other is pixels for other in self._held.values()):
            del self._names[id(pixels)]


def open_vllm(
    model: str | Path,
    *,
    level_token_ids: tuple[int, ...],
    level_values: tuple[float, ...],
    config: VllmConfig | None = None,
) -> VllmEngine:
    """The engine for a checkpoint's architecture: `VllmEngine`, or vLLM's own classifier where we have no model."""
    chosen = VllmEngine
    if read_config(str(model)).get("architectures") != [SUPPORTED]:
        from zscore.engines.vllm_classify import VllmClassifyEngine

        chosen = VllmClassifyEngine
    return chosen(model, level_token_ids=level_token_ids, level_values=level_values, config=config)


def _image_token(hf_config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        if (token := getattr(hf_config, name, None)) is not None:
            return int(token)
    raise ModelError(f"the config of a {hf_config.model_type} names no image token: it can't be scored with pictures")


def _check_levels(config: dict[str, Any], token_ids: tuple[int, ...], values: tuple[float, ...]) -> None:
    vocabulary = int((config.get("text_config") or config)["vocab_size"])
    if len(token_ids) != len(values) or len(token_ids) < 2:
        raise ModelError(f"{len(token_ids)} level tokens for {len(values)} level values: at least two of each")
    if len(set(token_ids)) != len(token_ids):
        raise ModelError(f"two levels have the same token: {list(token_ids)}")
    wrong = [token for token in token_ids if not 0 <= token < vocabulary]
    if wrong:
        raise ModelError(
            f"level token {wrong[0]} is outside the model's vocabulary of {vocabulary}:"
            " the tokenizer and the weights don't belong together"
        )
