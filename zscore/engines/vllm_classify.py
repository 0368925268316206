"""Fallback for architectures that our probe model doesn't know: vLLM's own conversion to a classifier.

It reads the last token of a prompt, so it scores the separate layout only, and pictures go through vLLM's own image
path: they are put together again from their patches, and the model's processor cuts them once more (which changes
nothing for the Qwen-VL family). Slower, but it runs whatever vLLM can wrap.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from zscore.checkpoint import read_checkpoint
from zscore.distribution import score_probes, unpack
from zscore.engines.vllm import VllmEngine
from zscore.engines.vllm_start import quiet, read_config, register_by_class, start
from zscore.errors import ModelError, UsageError
from zscore.records import Failure, Status

if TYPE_CHECKING:
    from zscore.engines.vllm_start import VllmConfig
    from zscore.records import EnginePrompt, LevelScores, Pixels


class VllmClassifyEngine(VllmEngine):
    """Scores single-probe prompts with any architecture that vLLM can convert; see `VllmEngine`."""

    def _start(self, model: str, config: VllmConfig) -> Any:
        config_json = read_config(model)
        architecture = str((config_json.get("architectures") or ["none"])[0])
        self._merge = read_checkpoint(model).merge
        register_by_class(architecture)
        import torch

        token_ids, values = self._levels
        self._values_K = torch.tensor(values, dtype=torch.float32)
        overrides = {
            "classifier_from_token": _spell(model, token_ids),
            "method": "no_post_processing",
            # The conversion looks for it here, where some of transformers 5's configs no longer have it.
            "tie_word_embeddings": _tied(config_json),
        }
        return start(model, config, convert="classify", hf_overrides={"text_config": overrides})

    def _add(self, request: str, prompt: EnginePrompt, picture: str) -> Failure | None:
        from vllm import PoolingParams

        if prompt.probes != (len(prompt.token_ids) - 1,):
            raise UsageError(
                "this architecture is scored by vLLM's classifier, one prompt a dimension: --layout separate"
            )
        tokens = list(prompt.token_ids)
        if count := tokens.count(self._image_token):
            first = tokens.index(self._image_token)
            tokens = [*tokens[: first + 1], *tokens[first + count :]]  # vLLM expands the placeholder
        raw = {
            "prompt_token_ids": tokens,
            "multi_modal_data": {"image": rebuild(prompt.pixels, self._merge)},
            "multi_modal_uuids": {"image": [picture]},
        }
        try:
            with quiet():
                self._engine.add_request(request, raw, PoolingParams(task="classify", use_activation=False))
        except Exception as error:
            if "longer than the maximum model length" not in str(error):
                raise
            # How many tokens a picture takes, only the model's own processor knows.
            return Failure(
                Status.PROMPT_TOO_LONG,
                f"more than {self.max_tokens} tokens with the picture's: shorten the prompt or lower --max-pixels",
            )
        return None

    def _scores(self, data: Any) -> LevelScores | Failure:
        import torch

        # The K logits, read as hidden states of a head whose weight is the identity.
        logits_1K = data.float().reshape(1, -1)
        return unpack(score_probes(logits_1K, torch.eye(logits_1K.shape[1]), self._values_K).numpy())


def fallback_notice(architecture: str) -> str:
    """What a user is told when this engine is chosen."""
    return (
        f"{architecture} has no joint probe model in zscore: it is scored through vLLM's own classifier,"
        " one prompt a dimension and a slower image path"
    )


def rebuild(pixels: Pixels, merge: int) -> Image.Image:
    """The picture that patches were cut from (see `zscore.patches.patchify`)."""
    rows, columns = pixels.grid
    patch = pixels.patches_NCPP.shape[-1]
    blocks = pixels.patches_NCPP.reshape(rows // merge, columns // merge, merge, merge, 3, patch, patch)
    rgb_HWC = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)
    return Image.fromarray(np.ascontiguousarray(rgb_HWC))


def _tied(config: dict[str, Any]) -> bool:
    text = config.get("text_config") or {}
    return bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def _spell(model: str, token_ids: tuple[int, ...]) -> list[str]:
    """The tokens as the tokenizer's vocabulary spells them: vLLM's conversion takes no ids."""
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    spelled = {token: words.id_to_token(token) for token in token_ids}
    missing = [token for token, text in spelled.items() if text is None]
    if missing:
        raise ModelError(f"level token {missing[0]} isn't in the tokenizer of {model}")
    return [text for text in spelled.values() if text is not None]
