"""The pictures of a training set, for random access: encoded as they are, in one local file.

Shards can only be read from front to back, and steps draw pictures at random. So what is wanted is copied once, in the
order of the shards, into a file beside the run; a picture is then one `pread`, whatever the shards lie on. Each is
decoded once on its way, so that one that can't be is left out there, and doesn't end the run at the step that draws it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from zscore.images import decode, load
from zscore.patches import PixelOptions, target_size
from zscore.records import Failure
from zscore.samples import ReadOptions, read_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from zscore.records import Pixels, Sample, ShardRef


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
        The samples (without their bytes) in the order of the shards, each with its place. Samples that can't be read,
        or whose picture can't be decoded, come with their failure and an empty place.
    """
    found = []
    with path.open("wb") as file:
        for shard in shards:
            for sample in read_samples(shard, options or ReadOptions()):
                if not wants(sample):
                    continue
                failure = sample.failure or _unreadable(sample.image)
                image = b"" if failure else sample.image
                place = Place(file.tell(), len(image), sha256(image).hexdigest())
                file.write(image)
                found.append((replace(sample, image=b"", failure=failure), place))
    return found


def _unreadable(data: bytes) -> Failure | None:
    """Why a picture can't be trained on, whatever it is resized to."""
    limits = PixelOptions()
    rgb_HWC = decode(data, limits)
    if isinstance(rgb_HWC, Failure):
        return rgb_HWC
    height, width, _ = rgb_HWC.shape
    size = target_size(height, width, limits)
    return size if isinstance(size, Failure) else None
