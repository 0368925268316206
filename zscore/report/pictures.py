"""Thumbnails of a few rows, out of the shards that were scored.

Only headers and the wanted samples are read of a local shard, whatever its size. What the page says of a picture is
true of that picture: its bytes must have the sha256 of the row, else the card says so instead.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from base64 import b64encode
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl
from PIL import Image

from zscore.errors import TableError
from zscore.images import decode
from zscore.passages import StandIns
from zscore.patches import PixelOptions
from zscore.records import Failure, ShardRef
from zscore.samples import ReadOptions, read_samples
from zscore.sources import locate
from zscore.tar import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from zscore.sources import Source

EDGE = 320
"""Pixels of the longer side: twice what a card shows on a desk, for screens of double density."""
MOST_BYTES = 20_000
"""Of one thumbnail, as far as the page has room; a photo takes 10,000."""
STEPS = ((EDGE, 76), (EDGE, 55), (EDGE, 35), (EDGE, 15), (224, 35), (160, 35), (112, 35), (80, 35), (56, 35), (24, 35))
"""Edge and quality, until a thumbnail is small enough; of noise the last takes 500 bytes."""
_MEDIA_TYPE = "image/webp"


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small picture, ready to be inlined."""

    url: str
    width: int
    height: int


@dataclass(slots=True)
class Thumbnails:
    """What could be read."""

    by_sample: dict[tuple[str, int], Thumbnail | str] = field(default_factory=dict)
    """By (shard, index); a text says why there is no picture."""
    faults: list[str] = field(default_factory=list)
    """One line a shard or picture that couldn't be shown."""


def sample_of(row: Mapping[str, Any]) -> tuple[str, int] | None:
    """Which sample a row is about; None where it doesn't say."""
    shard, index = row["shard"], row["index"]
    return None if shard is None or index is None or index < 0 else (str(shard), int(index))


def samples_of(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """The rows that say it by their samples, each once."""
    return {sample: row for row in rows if (sample := sample_of(row)) is not None}


def read_thumbnails(
    rows: Iterable[Mapping[str, Any]],
    shards: Sequence[ShardRef],
    options: Sequence[Mapping[str, Any]],
    most: int = MOST_BYTES,
) -> Thumbnails:
    """Thumbnails of the rows' pictures.

    Args:
        rows: with shard, index, key and perhaps sha256.
        shards: where to look.
        options: those of the scoring runs, which say what a sample's picture is. Where there are several, the one whose
            picture has the row's sha256 is right.
        most: bytes of one thumbnail.

    Raises:
        UsageError: options that can't be read.
        TableError: shards that the rows name aren't among them.
    """
    by_sample = samples_of(rows)
    found = Thumbnails()
    if not by_sample:
        return found
    wanted = pl.LazyFrame(
        [{"shard": shard, "index": index, "key": row["key"]} for (shard, index), row in by_sample.items()]
    )
    reads = _read_options(options)
    for source in locate(wanted, shards, checks_pictures=True):
        digests = {index: by_sample[source.name, index].get("sha256") for index in source.rows["index"].to_list()}
        made, fault = _of_shard(source, reads, digests, most)
        found.by_sample |= {(source.name, index): picture for index, picture in made.items()}
        found.faults += [f"{source.name}, sample {n}: {why}" for n, why in made.items() if isinstance(why, str)]
        found.faults += [fault] if fault else []
    return found


def _of_shard(
    source: Source, reads: Sequence[ReadOptions], digests: Mapping[int, str | None], most: int
) -> tuple[dict[int, Thumbnail | str], str]:
    """Thumbnails of one shard, or why there is none, and what is wrong with the shard itself."""
    found: dict[int, Thumbnail | str] = {}
    fault = ""
    for read in reads:
        fault = ""
        try:
            for index, data in _pictures(source, read):
                if not isinstance(found.get(index), Thumbnail):
                    made = _thumbnail(data, digests[index], most)
                    found[index] = made if isinstance(made, Thumbnail) else found.get(index, made)
        except TableError as error:  # the page is worth having without the pictures of a shard that broke since
            fault = str(error)
        if sum(isinstance(made, Thumbnail) for made in found.values()) == len(digests):
            return found, ""
    return found, fault


def _read_options(options: Sequence[Mapping[str, Any]]) -> list[ReadOptions]:
    """What of the options says how shards are read, each combination once; the defaults where there are none."""
    kinds = {"image_keys": str, "prompt_keys": str, "group_key": str, "max_image_bytes": int, "max_text_bytes": int}
    made = [
        ReadOptions(**{name: entry[name] for name, kind in kinds.items() if isinstance(entry.get(name), kind)})
        for entry in options
    ]
    return list(dict.fromkeys(made)) or [ReadOptions()]


def _pictures(source: Source, read: ReadOptions) -> Iterable[tuple[int, bytes | Failure]]:
    """The wanted samples' pictures: each sample is copied into a tar of its own and read as scoring reads it."""
    for passage, carrier in source.passages(-1, StandIns.of(read), lambda: None):
        with tempfile.NamedTemporaryFile(prefix="zscore-", suffix=".tar") as file:
            carrier.copy(passage, file.fileno())
            file.seek(0, io.SEEK_END)
            file.write(bytes(2 * BLOCK))
            file.flush()
            sample = next(read_samples(ShardRef(file.name, source.name, -1, ""), read))
        yield passage.index, sample.failure or sample.image


def _thumbnail(data: bytes | Failure, digest: str | None, most: int) -> Thumbnail | str:
    if isinstance(data, Failure):
        return data.error
    if digest and hashlib.sha256(data).hexdigest() != digest:
        return "the shard holds another picture than the one that was scored"
    rgb_HWC = decode(data, PixelOptions())
    if isinstance(rgb_HWC, Failure):
        return rgb_HWC.error
    image = Image.fromarray(rgb_HWC)
    encoded = b""
    for edge, quality in STEPS:
        image.thumbnail((edge, edge), Image.Resampling.LANCZOS, reducing_gap=3)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality, method=2)  # 4 takes twice as long for 3 % fewer bytes
        encoded = buffer.getvalue()
        if len(encoded) <= most:
            break
    return Thumbnail(f"data:{_MEDIA_TYPE};base64,{b64encode(encoded).decode()}", image.width, image.height)
