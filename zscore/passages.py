"""Which members of a tar belong to the wanted samples, and where their bytes lie.

Samples are counted and keyed exactly as in `zscore.samples`, since a row names its sample by that number. A link that
stands for neither a picture nor a text belongs to no sample there, and webdataset passes over it: it stays behind, and
is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from zscore.samples import split_name
from zscore.stores import ShardFault
from zscore.tar import Kind
from zscore.texts import GZIP_SUFFIX, parse_sources, parse_suffixes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from zscore.samples import ReadOptions
    from zscore.tar_copy import Carrier

_FILE, _SPARSE, _FOLDER, _LINK = Kind.FILE, Kind.SPARSE, Kind.FOLDER, Kind.LINK


@dataclass(frozen=True, slots=True)
class StandIns:
    """Suffixes of pictures and texts: a link counts as a file of its sample, thus for the numbers behind it."""

    images: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, read: ReadOptions) -> Self:
        """Those that scoring with these options knows."""
        texts = {source.suffix for source in parse_sources(read.prompt_keys)} | ({"json"} if read.group_key else set())
        images = parse_suffixes(read.image_keys, "image_keys")
        return cls(frozenset(images), frozenset({*texts, *(text + GZIP_SUFFIX for text in texts)}))

    def __contains__(self, suffix: str) -> bool:
        """Whether a link counts."""
        return suffix in self.images or suffix in self.texts

    def look_whole(self, suffixes: Collection[str]) -> bool:
        """Whether a picture and a text are there; whether more would have come, a cut shard can't tell."""
        return not self.images.isdisjoint(suffixes) and not self.texts.isdisjoint(suffixes)


class Passage:
    """One wanted sample and where its bytes lie."""

    __slots__ = ("index", "key", "links", "spans", "suffixes")

    def __init__(self, index: int, key: str, suffixes: set[str]) -> None:
        self.index = index
        self.key = key
        self.suffixes = suffixes
        self.spans: list[tuple[int, int]] = []
        """Of its members, headers included; neighbours are joined."""
        self.links = 0
        """Among its members, that stay behind."""

    def add(self, start: int, end: int) -> None:
        """Append a member."""
        if self.spans and self.spans[-1][1] == start:
            self.spans[-1] = (self.spans[-1][0], end)
        else:
            self.spans.append((start, end))

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(end - start for start, end in self.spans)


class Passages:
    """Iterates over the wanted samples of one shard.

    Copy a sample before the next is asked for, unless the carrier `can_wait`.

    Args:
        carrier: of the shard.
        wanted: numbers of the samples that are yielded; all others are passed over.
        stand_ins: suffixes for which a link counts as a file of the sample (see `zscore.samples`).

    Raises:
        ShardFault: while iterating: the tar ends early, is damaged, or has a global header.
    """

    def __init__(self, carrier: Carrier, wanted: Collection[int], stand_ins: StandIns) -> None:
        self._carrier = carrier
        self._wanted = wanted
        self._stand_ins = stand_ins
        self._run: Passage | None = None
        """The sample that is being read, if it is wanted."""
        self._links = ("", 0)
        """Key and number of the links passed over since the last sample began."""
        self.samples = 0
        """Begun so far; all of the shard's at the end."""

    def __iter__(self) -> Iterator[Passage]:
        """Yields each wanted sample once it is whole."""
        try:
            yield from self._whole()
        except ShardFault as fault:
            # Cut between members: `zscore.samples` takes such a sample too, and its row may be wanted.
            run, self._run = self._run, None
            if run is not None and fault.between_members and self._stand_ins.look_whole(run.suffixes):
                yield run
            raise
        if self._run is not None:
            yield self._run

    def _whole(self) -> Iterator[Passage]:
        """All but the last, which is left in `_run`."""
        carrier, stand_ins = self._carrier, self._stand_ins
        key, suffixes = None, set[str]()
        run: Passage | None = None
        begun = -1
        for start, name, kind in carrier.members():
            if begun >= 0:
                assert run is not None
                run.add(begun, start)
                begun = -1
            if kind is _FOLDER or (split := split_name(name)) is None:
                continue
            if kind is not _FILE and kind is not _SPARSE and split[1] not in stand_ins:
                self._pass(split[0], kind)
                continue
            if split[0] != key or split[1] in suffixes:
                if run is not None:
                    yield run
                key, suffixes = split[0], set()
                run = self._run = self._begin(key, suffixes)
            suffixes.add(split[1])
            if run is not None:
                carrier.keep()
                begun = start

    def _begin(self, key: str, suffixes: set[str]) -> Passage | None:
        run = Passage(self.samples, key, suffixes) if self.samples in self._wanted else None
        if run is not None and self._links[0] == key:
            run.links = self._links[1]
        self._links = "", 0
        self.samples += 1
        return run

    def _pass(self, key: str, kind: Kind) -> None:
        """A member that no sample has by `zscore.samples`; count a link whose sample is copied without it."""
        if kind is not _LINK:
            return
        if self._run is not None and self._run.key == key:
            self._run.links += 1
        else:
            self._links = key, self._links[1] + 1 if self._links[0] == key else 1
