"""The Qwen3.5 body inside vLLM, read at several positions: an out-of-tree pooling model and its pooler.

What differs from vLLM's own `convert="classify"`: the level distribution is read at every probe of a prompt instead
of at its last token only (one prefill for all dimensions), the score head sums in float32 over K rows instead of V, and
pictures come as uint8 patches that are scaled and doubled in time on the device.

Legend: T tokens of a step (all requests, one after the other), B probes of a step, D probes of one request, H hidden
size, K levels, W = K + 3 numbers of a probe (see `zscore.distribution`), N patches, C channels, P patch edge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration, Qwen3_5ProcessingInfo
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder, Qwen3VLMultiModalProcessor
from vllm.model_executor.models.utils import StageMissingLayer, no_init_weights
from vllm.multimodal import MULTIMODAL_REGISTRY

from zscore.distribution import score_probes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

TASK = "classify"
HEAD = "lm_head.weight"
TIED_HEAD = "embed_tokens.weight"


class LevelHead(torch.nn.Module):
    """The K rows of the output projection that belong to the level tokens, in the checkpoint's dtype.

    Products and sums are float32 whatever they are stored in: a float32 copy would only be more bytes to read.
    """

    weight_KH: torch.Tensor
    values_K: torch.Tensor

    def __init__(self, token_ids: Sequence[int], values: Sequence[float], hidden: int) -> None:
        super().__init__()
        self.token_ids = list(token_ids)
        self.filled = False
        self.register_buffer("weight_KH", torch.zeros(len(token_ids), hidden), persistent=False)
        self.register_buffer("values_K", torch.tensor(values, dtype=torch.float32), persistent=False)

    def fill(self, weight_VH: torch.Tensor) -> None:
        """Take the level rows of the full projection."""
        if weight_VH.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"the output projection is stored as {weight_VH.dtype}: float32, bfloat16 or float16 weights are needed"
            )
        dtype = torch.float32 if weight_VH.dtype == torch.float64 else weight_VH.dtype
        self.weight_KH = weight_VH[self.token_ids].to(self.values_K.device, dtype)
        self.filled = True

    def forward(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        """Packed level distributions (B, W)."""
        return score_probes(hidden_BH, self.weight_KH, self.values_K)


class ProbePooler(Pooler):  # type: ignore[misc]
    """Scores each request's hidden states at its probes (`PoolingParams.extra_kwargs["probes"]`).

    A prompt may reach the model in several chunks, and a preempted one starts over. So rows are found by absolute
    position (never by counting back from the last token, which would read a neighbour's rows when a boundary falls
    between two probes), and those of unfinished prompts wait in the request's pooling state.
    """

    def __init__(self, head: LevelHead) -> None:
        super().__init__()
        self.head = head

    def get_supported_tasks(self) -> set[str]:
        """The task name under which vLLM files us."""
        return {TASK}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor | None]:
        """One flat tensor (D × W) for each request that this step finishes, None for the others."""
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        ends = cursor.seq_lens_cpu.tolist()
        prompts = cursor.prompt_lens_cpu.tolist()
        ready: list[torch.Tensor] = []
        counts: list[int | None] = []
        first = 0  # row of the request's first token in this step
        for i, (tokens, end, prompt) in enumerate(zip(scheduled, ends, prompts, strict=True)):
            probes = (pooling_metadata.pooling_params[i].extra_kwargs or {}).get("probes") or (prompt - 1,)
            start = end - tokens
            rows = [first + probe - start for probe in probes if start <= probe < end]
            first += tokens
            earlier = sum(probe < start for probe in probes)
            held = _hold(pooling_metadata.pooling_states[i].hidden_states_cache, hidden_states, rows, earlier)
            if end < prompt:
                counts.append(None)
            else:
                ready += held
                held.clear()
                counts.append(len(probes))
        return self._score(ready, counts)

    def _score(self, ready: list[torch.Tensor], counts: list[int | None]) -> list[torch.Tensor | None]:
        if not ready:
            return [None] * len(counts)
        packed = iter(self.head(torch.cat(ready)).split([count for count in counts if count is not None]))
        return [None if count is None else next(packed).flatten() for count in counts]


def _hold(held: list[torch.Tensor], hidden_TH: torch.Tensor, rows: list[int], earlier: int) -> list[torch.Tensor]:
    """Append this step's probe rows to those of the `earlier` probes, and return the same list."""
    kept = torch.cat(held)[:earlier] if held else hidden_TH[:0]  # more only if the request was preempted
    if len(kept) != earlier:
        raise RuntimeError(
            f"{earlier} probes lie before this chunk, but {len(kept)} were seen: a prefix-cache hit skipped the rest"
            " (set skip_reading_prefix_cache)"
        )
    held[:] = [kept, hidden_TH[torch.tensor(rows, dtype=torch.long)]]  # copies: the buffer is reused
    return held


class _ProcessingInfo(Qwen3_5ProcessingInfo):  # type: ignore[misc]
    """No picture is larger than the longest prompt: what vLLM sizes its encoder budget by."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        del mm_counts
        return {"image": min(self.get_max_image_tokens(), seq_len)}


class _DummyInputs(Qwen3VLDummyInputsBuilder):  # type: ignore[misc]
    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        del mm_options
        vision = self.info.get_hf_config().vision_config
        token_edge = vision.patch_size * vision.spatial_merge_size
        tokens = min(self.info.get_max_image_tokens(), seq_len)
        width, height = self.info.get_image_size_with_most_features(max_pixels=tokens * token_edge**2)
        return {
            "image": self._get_dummy_images(width=width, height=height, num_images=mm_counts.get("image", 0)),
        }


@MULTIMODAL_REGISTRY.register_processor(Qwen3VLMultiModalProcessor, info=_ProcessingInfo, dummy_inputs=_DummyInputs)
class LevelProbeModel(Qwen3_5ForConditionalGeneration, VllmModelForPooling):  # type: ignore[misc]
    """Qwen3.5 whose output is the level distributions at a prompt's probes.

    The config carries `zscore_level_token_ids` and `zscore_level_values`.
    """

    is_pooling_model = True

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        # vLLM's own pooling adapters build models this way: the full projection is never allocated
        # (2 GB for the 9B: 248,320 × 4,096 × 2 bytes).
        with no_init_weights(
            self, lambda module: StageMissingLayer("output", module), targets=(LogitsProcessor, ParallelLMHead)
        ):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.tied = bool(config.tie_word_embeddings or config.text_config.tie_word_embeddings)
        self.level_head = LevelHead(
            config.zscore_level_token_ids, config.zscore_level_values, config.text_config.hidden_size
        )
        self.pooler = DispatchPooler({TASK: ProbePooler(self.level_head)})
        self.temporal = config.vision_config.temporal_patch_size
        processor = MULTIMODAL_REGISTRY.create_processor(vllm_config.model_config).info.get_image_processor()
        mean, std = pixel_scale(processor)
        device = self.level_head.values_K.device  # where the model is being built; pictures arrive there
        self.register_buffer("pixel_mean_C1", mean.unsqueeze(1).to(device), persistent=False)
        self.register_buffer("pixel_std_C1", std.unsqueeze(1).to(device), persistent=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the body; of the output projection, only the level rows are kept."""
        loaded: set[str] = super().load_weights(self._body(weights))
        if not self.level_head.filled:
            raise ValueError(f"the checkpoint has no {TIED_HEAD if self.tied else HEAD}: nothing to score with")
        return loaded

    def _body(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in weights:
            if name.endswith(TIED_HEAD if self.tied else HEAD):
                self.level_head.fill(weight)
            if not name.startswith("lm_head."):
                yield name, weight

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Run the vision tower; uint8 patches are made into the HF processor's pixel rows first."""
        pixels = kwargs.get("pixel_values")
        if isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8:
            on_device = pixels.to(self.pixel_mean_C1.device, non_blocking=True)
            kwargs["pixel_values"] = pixel_rows(
                on_device, self.pixel_mean_C1, self.pixel_std_C1, self.temporal, self.visual.dtype
            )
        return super().embed_multimodal(**kwargs)


def pixel_scale(processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (C,) of an HF image processor, in units of 1/255 where it rescales."""
    unit = 1.0 / processor.rescale_factor if processor.do_rescale else 1.0
    mean = torch.tensor(processor.image_mean if processor.do_normalize else [0.0] * 3, dtype=torch.float32)
    std = torch.tensor(processor.image_std if processor.do_normalize else [1.0] * 3, dtype=torch.float32)
    return (mean * unit).cpu(), (std * unit).cpu()


def pixel_rows(
    patches: torch.Tensor, mean_C1: torch.Tensor, std_C1: torch.Tensor, temporal: int, dtype: torch.dtype
) -> torch.Tensor:
    """Patches (N, C·P·P) uint8 → rows (N, C·temporal·P·P), bit for bit those of the HF image processor.

    That one folds the rescaling into mean and std, works in float32, and repeats a still picture in time inside each
    channel. Here the repetition comes after the cast: 7 ms for 1024² on one core, against 50.
    """
    patches_NCP = patches.reshape(len(patches), len(mean_C1), -1)
    scaled_NCP = patches_NCP.float().sub_(mean_C1).div_(std_C1).to(dtype)
    return scaled_NCP.unsqueeze(2).expand(-1, -1, temporal, -1).reshape(len(patches), -1)
