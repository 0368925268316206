"""Imported once by the fork server of `test_kill`; no threads are started by it."""

import zscore._torchvision

zscore._torchvision.ensure_importable()

import transformers  # noqa: E402
from transformers import AutoModelForImageTextToText, Qwen3_5ForConditionalGeneration  # noqa: E402, F401

import zscore.engines.transformers  # noqa: E402
import zscore.score  # noqa: E402

transformers.logging.set_verbosity_error()
