"""The pictures of a training set, for random access: encoded as they are, in one local file.

Shards can only be read from front to back, and steps draw pictures at random. So what is wanted is copied once, in the
order of the shards, into a file beside the run; a picture is then one `pread`, whatever the shards lie on. Each is
decoded once on its way, so that one that can't be is left out there, and doesn't end the run at the step that draws it.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from zscore.images import decode, load
from zscore.patches import PixelOptions, target_size
from zscore.records import Failure
from zscore.samples import ReadOptions, read_samples
from zscore_trainers.run_files import no_room

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
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
    wanted = (sample for shard in shards for sample in read_samples(shard, options or ReadOptions()) if wants(sample))
    with path.open("wb") as file:
        for sample in _decoded(wanted):
            place = Place(file.tell(), len(sample.image), sha256(sample.image).hexdigest())
            with no_room(path):
                file.write(sample.image)
            found.append((replace(sample, image=b""), place))
        with no_room(path):
            file.flush()
    return found


def _decoded(samples: Iterable[Sample]) -> Iterator[Sample]:
    """In their order; one that can't be decoded with its failure instead of its picture. A thread a core decodes."""
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Sample]] = deque()
        for sample in samples:
            ahead.append(pool.submit(_checked, sample))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _checked(sample: Sample) -> Sample:
    failure = sample.failure or _unreadable(sample.image)
    return sample if failure is None else replace(sample, image=b"", failure=failure)


def _unreadable(data: bytes) -> Failure | None:
    """Why a picture can't be trained on, whatever it is resized to."""
    limits = PixelOptions()
    rgb_HWC = decode(data, limits)
    if isinstance(rgb_HWC, Failure):
        return rgb_HWC
    height, width, _ = rgb_HWC.shape
    size = target_size(height, width, limits)
    return size if isinstance(size, Failure) else None
