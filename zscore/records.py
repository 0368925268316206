"""The records that pass from stage to stage: slotted, frozen, with no behaviour beyond their shape.

    ShardRef → Sample | Failure → Pixels → EnginePrompt → LevelScores → ScoreRow

Array legend: D dimensions, K levels, N image patches (before merging), P patch edge in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Status(StrEnum):
    """Outcome of a sample; the values are stable and stand in the `status` column."""

    OK = "ok"
    MISSING_IMAGE = "missing_image"
    MISSING_PROMPT = "missing_prompt"
    BAD_IMAGE = "bad_image"
    IMAGE_TOO_LARGE = "image_too_large"
    BAD_TEXT = "bad_text"
    PROMPT_TOO_LONG = "prompt_too_long"
    NONFINITE_SCORE = "nonfinite_score"
    NO_SCORE = "no_score"
    TRUNCATED_SHARD = "truncated_shard"
    BAD_SHARD = "bad_shard"
    UNREADABLE_SHARD = "unreadable_shard"


@dataclass(frozen=True, slots=True)
class ShardRef:
    """One shard: where it is, and what it is called in the output."""

    url: str
    """Path or fsspec url that opens it."""
    name: str
    """What the `shard` column says: the path relative to the common root of all inputs."""
    size: int
    """Bytes, or -1 where the store doesn't say."""
    version: str
    """Changes when the shard's bytes do (mtime, ETag); a finished part is only reused while it is equal."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sample (or the rest of a shard) has no score."""

    status: Status
    error: str
    """One line: the value, the limit, the fix."""
    output_tokens: int = 0
    """Written without coming to a score."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as the shard holds it, undecoded."""

    shard: str
    index: int
    """Position in the shard, from 0."""
    key: str
    prompt: str
    group: str
    image: bytes
    """Encoded picture; empty where `failure` says why."""
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Pixels:
    """A decoded, resized and patched picture.

    `patches_NCPP` holds uint8 RGB patches of shape (N, 3, P, P) in the order that the Qwen vision tower reads them
    (rows of merge×merge blocks). One temporal slice: the tower's second one is the same picture and is
    duplicated on the device, as is the scaling to [-1, 1], so that an eighth of the bytes travels.
    """

    patches_NCPP: NDArray[np.uint8]
    grid: tuple[int, int]
    """Patches down and across, before merging."""
    width: int
    """Of the picture as stored, after EXIF orientation, before resizing."""
    height: int


@dataclass(frozen=True, slots=True)
class EnginePrompt:
    """One prefill: token ids with the image placeholders already expanded, and the positions to read."""

    token_ids: tuple[int, ...]
    probes: tuple[int, ...]
    """Positions whose next-token logits are read, ascending; one a dimension (joint), just one (separate), or none
    where the model writes the score itself (reasoning)."""
    pixels: Pixels
    draw: int = 0
    """Which of several reasonings about the same question."""


@dataclass(frozen=True, slots=True)
class LevelScores:
    """What an engine returns for one prompt: a distribution at each probe (rows = probes)."""

    probs_DK: NDArray[np.float32]
    mean_D: NDArray[np.float32]
    """Expected level value, in rubric units (paper eq. 2)."""
    std_D: NDArray[np.float32]
    """Standard deviation, in rubric units."""
    entropy_D: NDArray[np.float32]
    """Shannon entropy in nats."""
    reasoning: tuple[str, ...] = ()
    """What the model wrote before its scores, a text a prompt; none where it scores at once."""
    output_tokens: int = 0
    """That the model wrote, all reasonings together."""


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One row of `scores.parquet`."""

    shard: str
    index: int
    key: str
    prompt: str
    group: str
    status: Status
    error: str | None
    width: int | None
    height: int | None
    sha256: str | None
    """Of the picture's encoded bytes, in hex."""
    scores: LevelScores | None
    """Rows in the rubric's dimension order; None unless the status is ok."""
