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
from zscore.patches import PixelOptions
from zscore.records import Failure, ShardRef
from zscore.samples import ReadOptions, read_samples
from zscore.shards import expand
from zscore.sources import locate
from zscore.tar import BLOCK
from zscore.texts import GZIP_SUFFIX, parse_sources, parse_suffixes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from zscore.sources import Source

EDGE = 320
"""Pixels of the longer side: twice what a card shows on a desk, for screens of double density."""
MOST_BYTES = 20_000
"""Of one thumbnail, so that 230 of them (`--top 60`) leave the page under 10 MB; a photo takes 10,000."""
QUALITIES = (76, 55, 35, 15)
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


def read_thumbnails(rows: Iterable[Mapping[str, Any]], shards: Sequence[str], options: Mapping[str, Any]) -> Thumbnails:
    """Thumbnails of the rows' pictures.

    Args:
        rows: with shard, index, key and perhaps sha256.
        shards: where to look, as given to `zscore score`.
        options: those of the scoring run, which say what a sample's picture is.

    Raises:
        UsageError: no shard where one is looked for.
        TableError: shards that the rows name aren't among them.
    """
    by_sample = {(str(row["shard"]), int(row["index"])): row for row in rows}
    found = Thumbnails()
    if not by_sample:
        return found
    wanted = pl.LazyFrame(
        [{"shard": shard, "index": index, "key": row["key"]} for (shard, index), row in by_sample.items()]
    )
    read = _read_options(options)
    for source in locate(wanted, expand(shards)):
        try:
            for index, data in _pictures(source, read):
                made = _thumbnail(data, by_sample[source.name, index].get("sha256"))
                found.by_sample[source.name, index] = made
                if isinstance(made, str):
                    found.faults.append(f"{source.name}, sample {index}: {made}")
        except TableError as error:  # the page is worth having without the pictures of a shard that broke since
            found.faults.append(str(error))
    return found


def _read_options(options: Mapping[str, Any]) -> ReadOptions:
    names = ("image_keys", "prompt_keys", "group_key", "max_image_bytes", "max_text_bytes")
    return ReadOptions(**{name: options[name] for name in names if name in options})


def _pictures(source: Source, read: ReadOptions) -> Iterable[tuple[int, bytes | Failure]]:
    """The wanted samples' pictures: each sample is copied into a tar of its own and read as scoring reads it."""
    for passage, carrier in source.passages(-1, _stand_ins(read), lambda: None):
        with tempfile.NamedTemporaryFile(prefix="zscore-", suffix=".tar") as file:
            carrier.copy(passage, file.fileno())
            file.seek(0, io.SEEK_END)
            file.write(bytes(2 * BLOCK))
            file.flush()
            sample = next(read_samples(ShardRef(file.name, source.name, -1, ""), read))
        yield passage.index, sample.failure or sample.image


def _stand_ins(read: ReadOptions) -> frozenset[str]:
    """Suffixes for which a link counts as a file of its sample, thus for the numbers of the samples behind it."""
    texts = {source.suffix for source in parse_sources(read.prompt_keys)} | ({"json"} if read.group_key else set())
    images = parse_suffixes(read.image_keys, "image_keys")
    return frozenset({*images, *texts, *(text + GZIP_SUFFIX for text in texts)})


def _thumbnail(data: bytes | Failure, digest: str | None) -> Thumbnail | str:
    if isinstance(data, Failure):
        return data.error
    if digest and hashlib.sha256(data).hexdigest() != digest:
        return "the shard holds another picture than the one that was scored"
    rgb_HWC = decode(data, PixelOptions())
    if isinstance(rgb_HWC, Failure):
        return rgb_HWC.error
    image = Image.fromarray(rgb_HWC)
    image.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS, reducing_gap=3)
    encoded = b""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality, method=2)  # 4 takes twice as long for 3 % fewer bytes
        encoded = buffer.getvalue()
        if len(encoded) <= MOST_BYTES:
            break
    return Thumbnail(f"data:{_MEDIA_TYPE};base64,{b64encode(encoded).decode()}", image.width, image.height)
