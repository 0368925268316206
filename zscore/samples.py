"""Tar members → Samples, grouped the way webdataset groups them. Whatever a shard holds, reading it raises nothing.

A sample is a run of files that share the key: the path up to the first dot behind the last slash. Folders, names
without a dot and webdataset's own `__…__` entries are passed over, and don't end a run. Where we differ from the
library:

- A suffix that comes twice in a run begins a new sample (webdataset stops with an error).
- A link, device or sparse file in the place of a picture or a text makes a row with a reason (webdataset drops it,
  or fills its holes).
- Only the picture and the texts are read; everything else is passed over unread.
- The sample that a cut falls in isn't given as if it were whole: one row with its key says where the shard ends. Cut
  between members, it counts as whole where a picture and a text are there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from zscore.errors import UsageError
from zscore.records import Failure, Sample, Status
from zscore.stores import ShardFault
from zscore.streams import open_stream
from zscore.tar import Kind, TarReader, shown
from zscore.texts import GZIP_SUFFIX, PromptSource, TextFault, Texts, parse_sources, parse_suffixes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zscore.records import ShardRef

_MAX_SUFFIXES = 4096
"""Of one run, remembered to tell repeats; bounds the memory of a run without end."""
_SHOWN_SUFFIXES = 5
_FILE, _SPARSE, _FOLDER = Kind.FILE, Kind.SPARSE, Kind.FOLDER  # an enum's members are slow to look up


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How samples are read from shards.

    Raises:
        UsageError: A value that can't be read, or a limit that isn't positive.
    """

    image_keys: str = "jpg;png;jpeg;webp;avif;gif;bmp;tif;tiff"
    """File suffixes of the picture, first choice first."""
    prompt_keys: str = "json:prompt;json:caption;txt"
    """Where the prompt stands, first choice first: `SUFFIX` is a text file, `SUFFIX:FIELD` a field of a JSON file."""
    group_key: str | None = None
    """Field of the `.json` file whose value makes a best-of-N group; None groups samples of the same prompt."""
    max_image_bytes: int = 256 << 20
    """Of an encoded picture; larger ones are passed over unread (image_too_large)."""
    max_text_bytes: int = 1 << 20
    """Of a text or JSON file; larger ones are passed over unread (prompt_too_long)."""
    max_samples: int = 10_000_000
    """Of one shard; the rest is passed over (bad_shard). A gzipped shard of nothing but headers holds billions."""
    attempts: int = 3
    """How often an open or a read is tried in all before the shard counts as unreadable."""
    retry_wait: float = 0.5
    """Seconds before the second attempt; doubles from there, to 10 at most."""

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "max_text_bytes", "max_samples", "attempts"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; the least is 1")
        if self.retry_wait < 0:
            raise UsageError(f"retry_wait is {self.retry_wait}; the least is 0")
        if self.group_key == "":
            raise UsageError("group_key is empty; leave it out to group by the prompt")
        parse_suffixes(self.image_keys, "image_keys")
        parse_sources(self.prompt_keys)


def read_samples(shard: ShardRef, options: ReadOptions | None = None) -> Iterator[Sample]:
    """Yields every sample of a shard, in its order, and one more row with a `Failure` where the shard breaks off.

    Args:
        shard: What `zscore.shards.expand` found.
        options: Suffixes and limits; the defaults if None.
    """
    options = options or ReadOptions()
    plan = _plan(options)
    index = 0
    try:
        with open_stream(shard.url, attempts=options.attempts, wait=options.retry_wait) as stream:
            for run in _runs(TarReader(stream), plan, load=True):
                yield run.sample(shard.name, index, plan)
                index += 1
    except ShardFault as fault:
        yield Sample(shard.name, index, fault.key, "", "", b"", fault.failure)


def count_samples(shard: ShardRef, options: ReadOptions | None = None) -> int:
    """Returns how many rows `read_samples` would yield, from the headers alone; contents are passed over."""
    options = options or ReadOptions()
    count = 0
    try:
        with open_stream(shard.url, attempts=options.attempts, wait=options.retry_wait) as stream:
            for _ in _runs(TarReader(stream), _plan(options), load=False):
                count += 1
    except ShardFault:
        count += 1
    return count


def split_name(name: str) -> tuple[str, str] | None:
    """Splits a member's name into its key and its suffix, as webdataset does.

    Returns:
        The path up to the first dot behind the last slash, and what follows that dot in lower case; None for names
        that belong to no sample.
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot < 0:
        return None
    if name[0] == "_" and name.startswith("__"):
        first = name.partition("/")[0]
        if first.endswith("__") and len(first) >= 4:
            return None  # webdataset's metadata
    if dot == base:
        # A hidden file has no key of its own; in a folder without dots webdataset keys it `folder/`.
        parent = name[: base - 1].rpartition("/")[2]
        if base == 0 or "." in parent:
            return None
    return name[:dot], name[dot + 1 :].lower()


@dataclass(frozen=True, slots=True)
class _Plan:
    """The options, parsed."""

    options: ReadOptions
    ranks: dict[str, int]
    """Of the picture's suffixes; lower is the better choice."""
    texts: frozenset[str]
    wanted: frozenset[str]
    """Pictures and texts."""
    sources: tuple[PromptSource, ...]


@lru_cache(maxsize=8)
def _plan(options: ReadOptions) -> _Plan:
    suffixes = parse_suffixes(options.image_keys, "image_keys")
    sources = parse_sources(options.prompt_keys)
    texts = {source.suffix for source in sources}
    if options.group_key is not None:
        texts.add("json")
    texts |= {suffix + GZIP_SUFFIX for suffix in texts}
    ranks = {suffix: rank for rank, suffix in reversed(list(enumerate(suffixes)))}
    return _Plan(options, ranks, frozenset(texts), frozenset(texts | ranks.keys()), sources)


class _Run:
    """The files of one sample so far."""

    __slots__ = ("_image", "_notes", "_rank", "_texts", "key", "suffixes")

    def __init__(self, key: str) -> None:
        self.key = key
        self.suffixes: set[str] = set()
        self._image: bytes | Failure | None = None
        self._rank = sys.maxsize
        self._texts: dict[str, bytes | Failure] = {}
        self._notes = ""

    def add(self, tar: TarReader, suffix: str, plan: _Plan, *, load: bool) -> None:
        """Takes the member that `tar` stands on, and of its contents what the sample needs."""
        rank = plan.ranks.get(suffix)
        if rank is not None:
            self.suffixes.add(suffix)
            if load:
                self._add_image(tar, rank, plan.options.max_image_bytes)
        elif suffix in plan.texts:
            self.suffixes.add(suffix)
            if load:
                self._add_text(tar, suffix, plan.options.max_text_bytes)
        elif len(self.suffixes) < _MAX_SUFFIXES:
            self.suffixes.add(suffix)

    def _add_image(self, tar: TarReader, rank: int, limit: int) -> None:
        """Takes the picture that `tar` stands on, unless a better choice is there."""
        if tar.kind is not _FILE and tar.kind is not _SPARSE:
            self._note(tar)
        elif rank < self._rank:
            self._rank = rank
            if tar.size > limit:
                text = f"{shown(tar.name)} has {tar.size} bytes; the limit is {limit}: raise --max-image-bytes"
                self._image = Failure(Status.IMAGE_TOO_LARGE, text)
            elif tar.kind is _SPARSE:
                self._image = Failure(Status.BAD_IMAGE, _sparse(tar))
            else:
                self._image = tar.read() or Failure(Status.BAD_IMAGE, f"{shown(tar.name)} is empty (0 bytes)")

    def _add_text(self, tar: TarReader, suffix: str, limit: int) -> None:
        """Takes the text that `tar` stands on."""
        if tar.kind is not _FILE and tar.kind is not _SPARSE:
            self._note(tar)
        elif tar.size > limit:
            text = f"{shown(tar.name)} has {tar.size} bytes; the limit is {limit}: raise --max-text-bytes"
            self._texts[suffix] = Failure(Status.PROMPT_TOO_LONG, text)
        elif tar.kind is _SPARSE:
            self._texts[suffix] = Failure(Status.BAD_TEXT, _sparse(tar))
        else:
            self._texts[suffix] = tar.read()

    def looks_whole(self, plan: _Plan) -> bool:
        """Whether a picture and a text are there; whether more would have come, a cut shard can't tell."""
        return bool(self.suffixes & plan.ranks.keys() and self.suffixes & plan.texts)

    def sample(self, shard: str, index: int, plan: _Plan) -> Sample:
        """Returns the sample; of several failures the picture's comes first."""
        prompt = group = ""
        failure = None if isinstance(self._image, bytes) else self._image or self._missing_image()
        texts = Texts(self._texts, plan.options.max_text_bytes)
        try:
            prompt = texts.prompt(plan.sources)
            group = texts.group(plan.options.group_key, prompt)
        except TextFault as fault:
            failure = failure or self._with_notes(fault.failure)
        image = self._image if isinstance(self._image, bytes) and failure is None else b""
        return Sample(shard, index, self.key, prompt, group, image, failure)

    def _missing_image(self) -> Failure:
        found = [f".{suffix}" for suffix in sorted(self.suffixes)]
        text = ", ".join(found[:_SHOWN_SUFFIXES]) + (", …" if len(found) > _SHOWN_SUFFIXES else "")
        return self._with_notes(Failure(Status.MISSING_IMAGE, f"no picture among {shown(text)} (see --image-keys)"))

    def _with_notes(self, failure: Failure) -> Failure:
        if failure.status in {Status.MISSING_IMAGE, Status.MISSING_PROMPT}:
            return Failure(failure.status, failure.error + self._notes)
        return failure

    def _note(self, tar: TarReader) -> None:
        self._notes += (
            f"; {shown(tar.name)} is {tar.kind} and not a file: pack it with --dereference --hard-dereference"
        )


def _runs(tar: TarReader, plan: _Plan, *, load: bool) -> Iterator[_Run]:
    """Groups members; with `load` the runs hold what they need of the contents."""
    options = plan.options
    run: _Run | None = None
    done = 0
    try:
        while tar.advance():
            if (split := split_name(tar.name)) is None or tar.kind is _FOLDER:
                continue
            key, suffix = split
            # A link only counts where it stands in for a picture or a text.
            if tar.kind is not _FILE and tar.kind is not _SPARSE and suffix not in plan.wanted:
                continue
            if run is None or key != run.key or suffix in run.suffixes:
                if run is not None:
                    yield run
                    run = None
                    done += 1
                run = _begin(key, done, options)
            run.add(tar, suffix, plan, load=load)
    except ShardFault as fault:
        # Cut between members: a sample that has a picture and a text is as whole as one can tell.
        if run is not None and fault.between_members and run.looks_whole(plan):
            yield run
            run = None
        fault.key = "" if run is None else run.key
        raise
    if run is not None:
        yield run
    tar.check_tail()


def _begin(key: str, index: int, options: ReadOptions) -> _Run:
    if index >= options.max_samples:
        raise ShardFault(
            Status.BAD_SHARD, f"more than {options.max_samples} samples (max_samples); the rest isn't read"
        )
    return _Run(key)


def _sparse(tar: TarReader) -> str:
    return f"{shown(tar.name)} is {tar.kind}, which isn't read: pack it without --sparse"
