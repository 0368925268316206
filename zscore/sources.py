"""Which source shards hold the rows of a table, kept ones or shown ones, and the samples in them.

A row names its sample by shard and number. Shards go by the names that they had in scoring, or, given from another
common root, by the end of their paths.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from zscore.errors import TableError
from zscore.passages import Passages
from zscore.stores import ShardFault
from zscore.tar_copy import open_carrier

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from zscore.passages import Passage, StandIns
    from zscore.records import ShardRef
    from zscore.tar_copy import Carrier


@dataclass(frozen=True, slots=True)
class Source:
    """One source shard and the rows that are wanted of it."""

    shard: ShardRef
    name: str
    """What the rows call it."""
    rows: pl.DataFrame
    """Columns index and, if known, key, ascending."""

    def passages(
        self, after: int, stand_ins: StandIns, before_closing: Callable[[], None]
    ) -> Generator[tuple[Passage, Carrier]]:
        """The wanted samples behind number `after`, each with the carrier that copies it.

        Args:
            after: -1 for all.
            stand_ins: see `zscore.passages`.
            before_closing: called before the shard is closed, for copies that are still to be made.

        Raises:
            TableError: a wanted sample isn't there, can't be read, or has another key than the row.
        """
        indexes = self.rows["index"].to_list()
        wanted = [index for index in indexes if index > after]
        named = zip(indexes, self.rows["key"].to_list(), strict=True) if "key" in self.rows else ()
        keys = {index: key for index, key in named if key is not None}
        if not wanted:
            return
        left = len(wanted)
        try:
            with open_carrier(self.shard.url) as carrier, contextlib.ExitStack() as stack:
                stack.callback(before_closing)
                passages = Passages(carrier, frozenset(wanted), stand_ins)
                for passage in passages:
                    if keys.get(passage.index, passage.key) != passage.key:
                        raise TableError(
                            f"sample {passage.index} of {self.shard.name} is '{passage.key}', the rows say "
                            f"'{keys[passage.index]}': the shard isn't the one that was scored"
                        )
                    yield passage, carrier
                    left -= 1
                    if not left:
                        return
        except ShardFault as fault:
            raise TableError(f"{self._lost(wanted, left)} can't be read: {fault.failure.error}") from fault
        raise TableError(
            f"{self._lost(wanted, left)} isn't there, the shard has {passages.samples:,} samples: "
            "it isn't the one that was scored"
        )

    def _lost(self, wanted: Sequence[int], left: int) -> str:
        more = f" (and {left - 1:,} more)" if left > 1 else ""
        return f"sample {wanted[-left]}{more} of {self.shard.name}"


def locate(wanted: pl.LazyFrame, shards: Sequence[ShardRef], *, checks_pictures: bool = False) -> list[Source]:
    """The source shards of which something is wanted, in their order.

    Args:
        wanted: rows with `shard` and `index`, and perhaps `key`.
        shards: where to look.
        checks_pictures: whether the caller compares contents, so that it may look into a shard of another folder.

    Raises:
        TableError: a row names no sample, one that another row names, or a shard that isn't there.
    """
    columns = wanted.collect_schema().names()
    names = [name for name in ("shard", "index", "key") if name in columns]
    rows = wanted.select(names).with_columns(pl.col("shard").cast(pl.String), pl.col("index").cast(pl.Int64)).collect()
    empty = rows.filter(pl.col("shard").is_null() | pl.col("index").is_null() | (pl.col("index") < 0))
    if empty.height:
        raise TableError(f"{empty.height:,} rows name no sample; the first: {empty.row(0)}")
    twice = rows.select("shard", "index").filter(pl.struct("shard", "index").is_duplicated())
    if twice.height:
        raise TableError(f"{twice.unique().height:,} samples are named twice; the first: {twice.row(0)}")
    by_name = {
        str(part["shard"][0]): part.drop("shard").sort("index")
        for part in rows.partition_by("shard", maintain_order=True)
    }
    found = _located(list(by_name), shards)
    for shard in () if checks_pictures else shards:
        if shard.url in found and _is_elsewhere(shard, found[shard.url]):
            raise TableError(
                f"the rows' shard '{found[shard.url]}' and {shard.url} share no more than a file name: give --shards "
                "from the same folder as in scoring, or call the folder as it was called"
            )
    return [Source(shard, found[shard.url], by_name[found[shard.url]]) for shard in shards if shard.url in found]


def _located(names: Sequence[str], shards: Sequence[ShardRef]) -> dict[str, str]:
    """Url of the shard → name in the rows. Another common root than in scoring makes one name the end of the other."""
    exact = {shard.name: shard for shard in shards}
    found, missing = {}, []
    for name in names:
        ends = [exact[name]] if name in exact else [shard for shard in shards if _same_end(shard, name)]
        if len(ends) > 1:
            raise TableError(
                f"the rows' shard '{name}' may be {ends[0].url} or {ends[1].url}: give --shards as in scoring"
            )
        if not ends:
            missing.append(name)
        else:
            found[ends[0].url] = name
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise TableError(
            f"{len(missing):,} of the {len(names):,} shards that the rows name aren't in --shards: "
            f"{', '.join(missing[:3])}{more}; there are {len(shards):,}, the first called {shards[0].name}"
        )
    if len(found) < len(names):
        raise TableError("two shard names of the rows stand for the same file: give --shards as in scoring")
    return found


def _is_elsewhere(shard: ShardRef, name: str) -> bool:
    """Whether both say a folder, and not the same: shards of two runs are often called alike."""
    folder, _, file = name.rpartition("/")
    there = f"{folder.rpartition('/')[2]}/{file}"
    return bool(folder) and shard.name != name and not f"/{shard.url}".endswith(f"/{there}")


def _same_end(shard: ShardRef, name: str) -> bool:
    return f"/{shard.url}".endswith(f"/{name}") or f"/{name}".endswith(f"/{shard.name}")
