"""The pictures of a training set, for random access: encoded as they are, in one local file.

Shards can only be read from front to back, and steps draw pictures at random. So what is wanted is copied once, in the
order of the shards, into a file beside the run; a picture is then one `pread`, whatever the shards lie on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from zscore.images import load
from zscore.samples import ReadOptions, read_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from zscore.patches import PixelOptions
    from zscore.records import Failure, Pixels, Sample, ShardRef


@dataclass(frozen=True, slots=True)
class Place:
    """Where a picture lies in the file."""

    start: int
    size: int
    sha256: str
    """Of the bytes."""


class PictureFile:
    """Read access to the copied pictures; close it, or use `contextlib.closing`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def read(self, place: Place, options: PixelOptions) -> Pixels | Failure:
        """Decode a picture and cut it into patches."""
        return load(os.pread(self._descriptor, place.size, place.start), options)


def collect(
    shards: Iterable[ShardRef],
    path: Path,
    wants: Callable[[Sample], bool],
    options: ReadOptions | None = None,
) -> list[tuple[Sample, Place]]:
    """Copy the pictures of wanted samples into a new file.

    Returns:
        The samples (without their bytes) in the order of the shards, each with its place. Samples that can't be read
        come with their failure and an empty place.
    """
    found = []
    with path.open("wb") as file:
        for shard in shards:
            for sample in read_samples(shard, options or ReadOptions()):
                if not wants(sample):
                    continue
                image = b"" if sample.failure else sample.image
                found.append((_without_bytes(sample), Place(file.tell(), len(image), sha256(image).hexdigest())))
                file.write(image)
    return found


def _without_bytes(sample: Sample) -> Sample:
    return type(sample)(sample.shard, sample.index, sample.key, sample.prompt, sample.group, b"", sample.failure)
