"""Where shards lie: files read with pread, anything else through fsspec, both opened again after an error.

Local files are not mapped: a file that another process cuts short while it is mapped kills the reader with SIGBUS,
whereas pread just returns less.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from zscore.records import Failure, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

_LOCAL_WINDOW = 64 << 10
# One request per window: at 50 ms of latency this is 160 MB/s a shard.
_REMOTE_WINDOW = 8 << 20
_LONGEST_WAIT = 10.0
_FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)
_PASSING_4XX = frozenset({408, 425, 429})
_VERSION_FIELDS = (
    *("ETag", "etag", "generation", "md5Hash", "crc32c", "blob_id", "oid", "Content-MD5", "Digest"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created"),
)
_USER = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"\?[^\s'\"<>)]+")


class ShardFault(Exception):  # noqa: N818  # not the caller's error: it becomes the last row of its shard
    """The rest of a shard can't be read. Carries the `Failure` of its row and never leaves `zscore.samples`."""

    def __init__(self, status: Status, error: str, *, between_members: bool = False) -> None:
        super().__init__(error)
        self.failure = Failure(status, error)
        self.between_members = between_members
        self.key = ""
        """Of the sample that the fault falls in; filled in by whoever knows it."""


class Source(Protocol):
    """The bytes of one shard by their offset, or a stand-in that can only go forward."""

    size: int | None
    """Bytes, None where only reading to the end tells."""
    window: int
    """Bytes worth asking for at once."""
    rereads: bool
    """Whether going back costs nothing; if not, offsets only rise."""

    def read_at(self, offset: int, count: int) -> bytes:
        """Returns 1 to `count` bytes, and none only at the end."""

    def close(self) -> None:
        """Gives back what is held open."""


class VersionedSource(Source, Protocol):
    """A source that knows what it opened."""

    version: str
    """Changes when the bytes do; empty where the store doesn't say."""


class LocalSource:
    """A file of this machine, or of anything mounted on it."""

    window = _LOCAL_WINDOW
    rereads = True

    def __init__(self, path: str) -> None:
        # O_NONBLOCK: opening a FIFO that is named like a shard must not hang the run.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        info = os.fstat(self._descriptor)
        if not stat.S_ISREG(info.st_mode):
            self.close()
            raise IsADirectoryError(errno.EISDIR, "not a regular file", path)
        self.size: int | None = info.st_size
        self.version = local_version(info)

    def read_at(self, offset: int, count: int) -> bytes:
        """See `Source`."""
        return os.pread(self._descriptor, count, offset)

    def close(self) -> None:
        """See `Source`."""
        os.close(self._descriptor)


class RemoteSource:
    """An object in any store that fsspec opens."""

    window = _REMOTE_WINDOW
    rereads = False

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # 0.3 s of imports that local shards don't need

        self._files, self._path = url_to_fs(url)
        # A listing older than the object would give the wrong size.
        self._files.invalidate_cache()
        self._open(_REMOTE_WINDOW)

    def _open(self, block_size: int) -> None:
        # No cache of fsspec's: the reader's own window would be a second copy of it.
        self._file: Any = self._files.open(self._path, "rb", block_size=block_size, cache_type="none")
        self._ranged = block_size > 0
        self._at = 0
        self.size: int | None = getattr(self._file, "size", None)
        self.version = remote_version(getattr(self._file, "details", None) or {})

    def read_at(self, offset: int, count: int) -> bytes:
        """See `Source`."""
        try:
            return self._read_at(offset, count)
        except ValueError:
            if not self._ranged:
                raise
        # An HTTP server without range requests: what it has can only be streamed from the beginning.
        self._file.close()
        size = self.size
        self._open(0)
        self.size = size
        return self._read_at(offset, count)

    def _read_at(self, offset: int, count: int) -> bytes:
        if offset != self._at:
            try:
                self._file.seek(offset)
                self._at = offset
            except (ValueError, io.UnsupportedOperation):
                self._discard(offset - self._at)
        data: bytes = self._file.read(count)
        self._at += len(data)
        return data

    def _discard(self, count: int) -> None:
        while count > 0 and (data := self._file.read(min(count, _REMOTE_WINDOW))):
            self._at += len(data)
            count -= len(data)

    def close(self) -> None:
        """See `Source`."""
        self._file.close()


class PatientSource:
    """Opens a source again after an error, so that a dropped connection costs seconds and not the shard.

    Errors that no waiting mends (missing, forbidden) are final at once.

    Raises:
        ShardFault: unreadable_shard, after the last attempt.
    """

    def __init__(self, url: str, *, attempts: int, wait: float) -> None:
        self._url = url
        self._attempts = attempts
        self._wait = wait
        self._source: VersionedSource | None = None
        source = self._try(self._reopen)
        self.size = source.size
        self.window = source.window
        self.rereads = source.rereads
        self._version = source.version

    def read_at(self, offset: int, count: int) -> bytes:
        """See `Source`."""
        return self._try(lambda: self._read_at(offset, count))

    def close(self) -> None:
        """See `Source`."""
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def _reopen(self) -> VersionedSource:
        self._source = RemoteSource(self._url) if is_remote(self._url) else LocalSource(self._url)
        return self._source

    def _read_at(self, offset: int, count: int) -> bytes:
        source = self._source
        if source is None:
            source = self._reopen()
            if (source.version, source.size) != (self._version, self.size):
                text = "the shard was overwritten while it was read: run again once nothing writes to it"
                raise ShardFault(Status.UNREADABLE_SHARD, text)
        return source.read_at(offset, count)

    def _try(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except ShardFault:
            raise
        except Exception as error:  # noqa: BLE001  # stores raise from a dozen unrelated trees
            first = error
        self.close()
        if self._attempts <= 1 or is_final(first):
            self._give_up(first)
        return self._try_again(call, first)

    def _try_again(self, call: Callable[[], T], first: Exception) -> T:
        from tenacity import (  # 0.1 s of imports that only errors need
            Retrying,
            retry_if_exception,
            stop_after_attempt,
            wait_exponential,
            wait_random,
        )

        earlier = [first]

        def attempt() -> T:
            if earlier:
                raise earlier.pop()
            self.close()
            return call()

        retrying = Retrying(
            stop=stop_after_attempt(self._attempts),
            # The random part keeps workers that lost one store together from coming back together.
            wait=wait_exponential(multiplier=self._wait, max=_LONGEST_WAIT) + wait_random(0, self._wait),
            retry=retry_if_exception(lambda error: not is_final(error)),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except ShardFault:
            raise
        except Exception as error:  # noqa: BLE001  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> NoReturn:
        tries = "" if self._attempts <= 1 or is_final(error) else f" ({self._attempts} attempts)"
        raise ShardFault(Status.UNREADABLE_SHARD, f"can't read the shard: {reason(error)}{tries}") from error


def is_remote(url: str) -> bool:
    """Whether fsspec opens it."""
    return "://" in url


def local_version(info: os.stat_result) -> str:
    """What `ShardRef.version` says of a local file."""
    return str(info.st_mtime_ns)


def remote_version(details: Mapping[str, object]) -> str:
    """What `ShardRef.version` says of an object: the first of its store's ETag, hash or time of change."""
    value: Any = next((details[name] for name in _VERSION_FIELDS if details.get(name)), "")
    # Some stores give a time as a number where they list and as a datetime where they are asked for one object.
    return str(value.timestamp() if hasattr(value, "timestamp") else value).strip('"')


def reason(error: BaseException) -> str:
    """Says why a store refused, in one line and without the secrets that signed urls carry."""
    cause = _cause(error)
    status = http_status(cause)
    if isinstance(message := getattr(cause, "message", None), str) and status is not None:
        text = f"HTTP {status} {message}"
    else:
        text = str(getattr(cause, "strerror", None) or cause) or type(cause).__name__
    return _QUERY.sub("?…", _USER.sub("…@", " ".join(text.split())))[:300]


def without_secrets(url: str) -> str:
    """A url as it may stand in the output: no user, and no query where http may carry a signature."""
    url = _USER.sub("", url)
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, botocore, requests or httpx carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _cause(error: BaseException) -> BaseException:
    # fsspec's HTTP says FileNotFoundError of every trouble, a refused connection included; the cause is the truth.
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error


def is_final(error: BaseException) -> bool:
    """Whether no waiting mends it: missing or forbidden, as opposed to busy or cut off."""
    if isinstance(error, ShardFault):
        return True
    cause = _cause(error)
    status = http_status(cause)
    if status is not None:
        return 400 <= status < 500 and status not in _PASSING_4XX  # the client errors of HTTP
    return isinstance(cause, _FINAL_ERRORS)
